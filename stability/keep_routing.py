"""Keep Routing: training uses the experts that generation used (arXiv 2512.02556, section 3.1).

At every MoE layer the recorded expert ids replace the router's own choice; the gate weights of those experts still
come from the router's own logits, so the router keeps its gradient.

The ids travel as a keyword of the model's forward, `model(..., routed_experts=ids)`: every decoder layer receives it
and a hook takes it off before the layer runs. Only so does activation checkpointing recompute a layer with the ids of
its own micro-batch; ids kept in an attribute of the model give wrong gradients without any error when micro-batches
interleave.

A router is supported when one of three gate formulas reproduces its own weights bit for bit on random input (checked
at install, never assumed): softmax (Qwen-MoE, OLMoE, Mixtral), sigmoid (DeepSeek-V3, GLM-4-MoE), softmax over the
chosen (GPT-OSS).

Shapes: T = packed tokens, L = decoder layers, K = experts per token, E = experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

KEYWORD = "routed_experts"
"""The model keyword that carries int16 ids [T, L, K]; -1 in a row's first slot = no record, the router chooses by
itself."""

GateFormula = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(router, logits [T, E], expert ids [T, K]) -> gate weights [T, K]."""


class UnknownRouterError(TypeError):
    """A router whose gate weights cannot be recomputed for given experts."""


def _softmax_gates(router: Any, logits: Tensor, ids: Tensor) -> Tensor:
    gates = torch.softmax(logits, dim=-1, dtype=torch.float32).gather(-1, ids)
    return gates / gates.sum(-1, keepdim=True) if getattr(router, "norm_topk_prob", True) else gates


def _sigmoid_gates(router: Any, logits: Tensor, ids: Tensor) -> Tensor:
    gates = logits.sigmoid().gather(-1, ids)  # a correction bias and expert groups only choose; they do not weigh
    if getattr(router, "norm_topk_prob", True):
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    return gates * getattr(router, "routed_scaling_factor", 1.0)


def _chosen_softmax_gates(router: Any, logits: Tensor, ids: Tensor) -> Tensor:
    return torch.softmax(logits.gather(-1, ids), dim=-1, dtype=logits.dtype)


GATE_FORMULAS: tuple[GateFormula, ...] = (_softmax_gates, _sigmoid_gates, _chosen_softmax_gates)


@dataclass(frozen=True, slots=True)
class _Gate:
    """What the self-check found out about a router."""

    formula: GateFormula
    num_slots: int


class RoutingReplay:
    """The handle of an installed replay; counts, while asked to, how often the routers would have chosen the same."""

    def __init__(self, layers: tuple[_ReplayedLayer, ...]) -> None:
        self._layers = layers

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Decoder layers that have a router."""
        return tuple(layer.index for layer in self._layers)

    @property
    def slots_per_token(self) -> int:
        """K, the experts each router chooses for a token."""
        return self._layers[0].num_slots

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts agreement in the forward passes inside; the recomputation of a later backward is not counted twice."""
        for layer in self._layers:
            layer.counting = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer.counting = False

    def agreement(self) -> Tensor:
        """Since the last reset: slots the router would itself have chosen, slots replayed. int64 [L_moe, 2], on CPU."""
        return torch.stack([layer.counts.cpu() for layer in self._layers])

    def reset(self) -> None:
        """Sets all counts to zero."""
        for layer in self._layers:
            layer.counts = torch.zeros(2, dtype=torch.int64)


class _ReplayedLayer:
    """The hooks of one decoder layer and its router."""

    def __init__(self, index: int, num_layers: int, layer: nn.Module, router: nn.Module, gate: _Gate) -> None:
        self.index = index
        self.num_slots = gate.num_slots
        self.counting = False
        self.counts = torch.zeros(2, dtype=torch.int64)
        self._num_layers = num_layers
        self._formula = gate.formula
        self._ids: Tensor | None = None
        layer.register_forward_pre_hook(self._take_ids, with_kwargs=True)
        router.register_forward_hook(self._replace_choice)

    def _take_ids(
        self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Runs inside the checkpointed region, so that a recomputed layer sees the ids of its own micro-batch."""
        ids, rest = _without_keyword(kwargs)
        if ids is not None and (ids.dim() != 3 or ids.shape[1] != self._num_layers):
            raise ValueError(
                f"{KEYWORD} must be [tokens, {self._num_layers} decoder layers, experts], got {tuple(ids.shape)}"
            )
        self._ids = None if ids is None else ids[:, self.index]
        return args, rest

    def _replace_choice(self, router: nn.Module, _args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        recorded, self._ids = self._ids, None
        if recorded is None:
            return output
        logits, weights, own = output[:3]
        if recorded.shape != own.shape:
            raise ValueError(
                f"{KEYWORD} of decoder layer {self.index} is {tuple(recorded.shape)} "
                f"but its router chooses {tuple(own.shape)}"
            )
        known = recorded[:, :1] >= 0
        ids = torch.where(known, recorded.to(own.dtype), own)
        if self.counting:
            self._count(ids, own, known)
        return (logits, self._formula(router, logits, ids).to(weights.dtype), ids, *output[3:])

    @torch.no_grad()
    def _count(self, ids: Tensor, own: Tensor, known: Tensor) -> None:
        same = (ids[:, :, None] == own[:, None, :]).any(-1) & known
        seen = torch.stack([same.sum(), known.sum() * own.shape[1]])
        self.counts = self.counts.to(seen.device, non_blocking=True) + seen


def install(model: PreTrainedModel) -> RoutingReplay | None:
    """Makes `model(..., routed_experts=ids)` force the recorded experts; without the keyword nothing changes.

    Returns the handle, or None for a dense model (which has nothing to replay, and no hooks to take the keyword).

    Install once, before sharding. Works with activation checkpointing (`use_reentrant=False`) and under FSDP2.

    Raises:
        UnknownRouterError: no gate formula reproduces a router's own weights.
    """
    layers = decoder_layers(model)
    routers = {index: router for index, layer in enumerate(layers) if (router := _router_of(layer)) is not None}
    if not routers:
        return None
    gates = {kind: _match_gate(router) for kind, router in {type(r): r for r in routers.values()}.items()}
    replayed = []
    for index, layer in enumerate(layers):
        if index in routers:
            replayed.append(_ReplayedLayer(index, len(layers), layer, routers[index], gates[type(routers[index])]))
        else:
            layer.register_forward_pre_hook(_drop_keyword, with_kwargs=True)
    return RoutingReplay(tuple(replayed))


def check_supported(hf_config: PretrainedConfig) -> bool:
    """Whether the model of a config is a Mixture of Experts; no weights are read or made (meta device), so it is quick.

    Raises:
        UnknownRouterError: it is one, but its router is not understood.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    router = next((router for layer in decoder_layers(model) if (router := _router_of(layer)) is not None), None)
    if router is None:
        return False
    _match_gate(router)
    return True


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers in order; their indices are those of `routed_experts`."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise UnknownRouterError(
            f"{type(model).__name__} has no list of decoder layers: set stability.keep_routing = false"
        )
    return list(layers)


def _router_of(layer: nn.Module) -> nn.Module | None:
    """The router beside the layer's `experts`; None for a dense layer."""
    blocks = [module for module in layer.modules() if hasattr(module, "experts")]
    if not blocks:
        return None
    routers = [
        r for block in blocks if isinstance(r := getattr(block, "gate", getattr(block, "router", None)), nn.Module)
    ]
    if len(routers) != 1:
        raise UnknownRouterError(
            f"{type(blocks[0]).__name__} has {len(routers)} routers beside its experts where one named `gate` or "
            "`router` is expected: set stability.keep_routing = false"
        )
    return routers[0]


@torch.no_grad()
def _match_gate(router: nn.Module) -> _Gate:
    """The formula whose gates equal the router's own bit for bit, for random weights and input."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.dim() > 1 else 0.1)
        for name, tensor in (*router.named_parameters(), *router.named_buffers())
    }
    width = next((tensor.shape[-1] for tensor in state.values() if tensor.dim() == 2), None)
    if width is None:
        raise _unknown(router, "it has no weight matrix")
    hidden = torch.randn(64, width, generator=generator)
    try:
        logits, weights, ids = torch.func.functional_call(router, state, (hidden,))[:3]
        for formula in GATE_FORMULAS:
            if torch.equal(formula(router, logits, ids).to(weights.dtype), weights):
                return _Gate(formula, ids.shape[-1])
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise _unknown(router, f"{type(error).__name__}: {error}") from error
    raise _unknown(router, "no known gate formula reproduces its own weights")


def _unknown(router: nn.Module, reason: str) -> UnknownRouterError:
    return UnknownRouterError(
        f"keep_routing does not understand the router {type(router).__name__} ({reason}): "
        "set stability.keep_routing = false to train this model without routing replay"
    )


def _without_keyword(kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    return kwargs.get(KEYWORD), {name: value for name, value in kwargs.items() if name != KEYWORD}


def _drop_keyword(
    _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, _without_keyword(kwargs)[1]
