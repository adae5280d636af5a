"""A layer's experts loaded at once.

A checkpoint names every expert by itself, and vLLM spends a third of a millisecond on each tensor: half a second per
update for 8 layers of 64 experts. In a bucket the same projection of all experts of a layer lies in one piece, and the
loader of vLLM's expert layer takes such a piece whole. Whatever is not in one piece, because a bucket ends in between,
a model names its experts otherwise or an engine holds only some of them, goes vLLM's usual way.

Shapes: E = experts of a layer, I = their inner width, H = the model's width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

_NAME = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_PLACES = {"gate_proj": ("w13_weight", "w1"), "up_proj": ("w13_weight", "w3"), "down_proj": ("w2_weight", "w2")}
"""vLLM's parameter [E, 2 I, H] or [E, H, I], and its name for the part of it."""

_Run = list[tuple[str, Tensor]]


class WholeExperts:
    """Takes out of a stream of checkpoint tensors what it can load whole, into some of a model's layers."""

    def __init__(self, layers: Mapping[str, torch.nn.Module]) -> None:
        self._layers: dict[str, Any] = {
            name.removesuffix(".routed_experts"): layer
            for name, layer in layers.items()
            if isinstance(layer, RoutedExperts) and holds_all_experts(layer)
        }

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors that vLLM still has to load, in their order."""
        run: _Run = []
        for name, tensor in tensors:
            if run and not _continues(run, name, tensor):
                yield from run
                run = []
            prefix, expert = _parse(name)
            layer = self._layers.get(prefix)
            if layer is None or (not run and expert != 0):
                yield name, tensor
                continue
            run.append((name, tensor))
            if len(run) == layer.w13_weight.shape[0]:
                _load_whole(layer, run)
                run = []
        yield from run


def holds_all_experts(layer: Any) -> bool:
    """Whether a `RoutedExperts` layer holds unquantized gate, up and down projections of every expert of the model."""
    moe = layer.moe_config
    parameters = {name for name, _ in layer.named_parameters()}
    return (
        moe.is_act_and_mul
        and layer.quant_config is None
        and parameters >= {"w13_weight", "w2_weight"}
        and layer.w13_weight.shape[0] == moe.num_experts
    )


def _parse(name: str) -> tuple[str, int]:
    match = _NAME.fullmatch(name)
    return (match[1], int(match[2])) if match else ("", -1)


def _continues(run: _Run, name: str, tensor: Tensor) -> bool:
    """Whether this is the next expert, as far behind the last one in memory as that one behind its predecessor."""
    (first_name, first), (_, last) = run[0], run[-1]
    expected = re.sub(r"\.experts\.0\.", f".experts.{len(run)}.", first_name)
    if name != expected or tensor.shape != first.shape or tensor.dtype != first.dtype:
        return False
    if tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
        return False
    distance = tensor.storage_offset() - last.storage_offset()
    return len(run) == 1 or distance == last.storage_offset() - run[-2][1].storage_offset()


def _load_whole(layer: Any, run: _Run) -> None:
    name, first = run[0]
    parameter_name, part = _PLACES[name.split(".")[-2]]
    distance = run[1][1].storage_offset() - first.storage_offset() if len(run) > 1 else first.numel()
    whole = first.as_strided((len(run), *first.shape), (distance, *first.stride()))
    parameter = getattr(layer, parameter_name)
    parameter.weight_loader(
        param=parameter,
        loaded_weight=whole,
        weight_name=parameter_name,
        shard_id=part,
        expert_id=0,
        return_success=True,
    )
