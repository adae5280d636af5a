"""An engine's parameters after an update, and what they must be: put together by hand from what was sent.

For a dense Qwen3 of `tests/tiny_models.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rollout.types import GenerateRequest
from rollout.weight_sync import WeightBucket, pack_buckets
from rollout.worker import RolloutWorker
from tests.rollout.engine_reference import compare
from tests.tiny_models import perturb

Tensors = list[tuple[str, Tensor]]
NUM_LAYERS = 3


def call(worker: RolloutWorker, function: Callable[[Any], Any]) -> Any:
    """Runs a function of the engine's weight transfer in the engine's thread."""

    def run(wrapper: Any) -> Any:
        return function(wrapper.worker.weight_transfer_engine)

    engine = worker._engine
    return asyncio.run(engine._ask(lambda: engine._llm.collective_rpc(run)))[0]


def forget(transfer: Any) -> None:
    transfer._direct_load = None


def direct_layers(transfer: Any) -> set[str]:
    return set(transfer._direct._layers)


def live_parameters(transfer: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in transfer.model.named_parameters()}


def send(worker: RolloutWorker, tensors: Iterable[tuple[str, Tensor]], *, max_bytes: int = 100_000) -> None:
    send_buckets(worker, pack_buckets(tensors, max_bytes=max_bytes))


def send_buckets(worker: RolloutWorker, buckets: Iterable[WeightBucket], *, finish: bool = True) -> None:
    async def run() -> None:
        await worker.begin_weight_update()
        for bucket in buckets:
            await worker.load_weights(bucket)
        if finish:
            await worker.finish_weight_update(1)

    asyncio.run(run())


def changed(model: PreTrainedModel, seed: int) -> Tensors:
    """The model's tensors with other values in each, as they are now."""
    perturb(model, seed=seed)
    return [(name, tensor.clone()) for name, tensor in model.state_dict().items()]


def fused(tensors: Tensors) -> Tensors:
    """With queries, keys and values under the name of vLLM's own parameter, which its loaders know as well."""
    given, result = dict(tensors), []
    for name, tensor in tensors:
        if ".q_proj." in name:
            parts = [given[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            result.append((name.replace("q_proj", "qkv_proj"), torch.cat(parts)))
        elif ".k_proj." not in name and ".v_proj." not in name:
            result.append((name, tensor))
    return result


def expected_parameters(tensors: Tensors) -> dict[str, Tensor]:
    """vLLM's parameters, put together by hand; embedding and head have rows of zeros up to a multiple of 64."""
    given = dict(fused(tensors))
    for layer in range(NUM_LAYERS):
        gate, up = (given.pop(f"model.layers.{layer}.mlp.{part}_proj.weight") for part in ("gate", "up"))
        given[f"model.layers.{layer}.mlp.gate_up_proj.weight"] = torch.cat([gate, up])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        given[name] = torch.nn.functional.pad(given[name], (0, 0, 0, 128 - 99))
    return given


def differing(worker: RolloutWorker, tensors: Tensors) -> list[str]:
    live, expected = call(worker, live_parameters), expected_parameters(tensors)
    assert live.keys() == expected.keys()
    return [name for name in live if not torch.equal(live[name], expected[name])]


def error_of(worker: RolloutWorker, model: PreTrainedModel) -> float:
    request = GenerateRequest(np.arange(3, 40, dtype=np.int32), (1,), 1.0, 0.9, 0, 30, ())
    (completion,) = asyncio.run(worker.generate(request))
    return float(np.abs(compare(model, request, completion).logprob_diff).max())


def shuffled(tensors: Tensors) -> Tensors:
    return [tensors[i] for i in np.random.default_rng(0).permutation(len(tensors))]


LINEAR = {
    f"model.layers.{layer}.{part}"
    for layer in range(NUM_LAYERS)
    for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
}
NORMS = {"model.norm"} | {
    f"model.layers.{layer}.{part}"
    for layer in range(NUM_LAYERS)
    for part in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm")
}
