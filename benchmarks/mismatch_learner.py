"""Changes to a learner's arithmetic, by hooks, for `benchmarks.gpu_mismatch`: causes closed, or put in one at a time.

`CHANGES` take a learner in half precision further from float32 or nearer to it. `ROUNDINGS` take one in float32 and
round one kind of value to bfloat16, so that each can be seen alone. Written for the layers of Qwen3-MoE and what is
built like it.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.policy.model import PolicyModel
from stability.keep_routing import decoder_layers

Change = Callable[[PolicyModel], AbstractContextManager[Any]]
NORMS = ("input_layernorm", "post_attention_layernorm")


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only, as FSDP2's mixed precision does: buffers stay as they are."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


@contextmanager
def float32_routers(policy: PolicyModel) -> Iterator[None]:
    """Router logits, gate weights and the sum over experts in float32; activations and weights as before."""
    with _forwards({layer.mlp.gate: _upcast for layer in _layers(policy)}):
        yield


def _upcast(router: Any, hidden: Tensor) -> Any:
    upcast = copy.copy(router)
    upcast._parameters = {name: parameter.float() for name, parameter in router._parameters.items()}
    return type(router).forward(upcast, hidden.float())


def plain_layers(policy: PolicyModel) -> AbstractContextManager[None]:
    """transformers' own layers, whose residual stream is half precision, for those of `grpo.policy.layers.decoder`."""
    return _own_forwards([*_layers(policy), policy.module.get_decoder().norm])


def plain_experts(policy: PolicyModel) -> AbstractContextManager[None]:
    """transformers' own experts in the place of `grpo.policy.layers.experts`."""
    return _own_forwards([layer.mlp.experts for layer in _layers(policy)])


@contextmanager
def _own_forwards(modules: Sequence[Any]) -> Iterator[None]:
    """Without what has replaced the forward of these modules."""
    replaced = {module: vars(module).pop("forward") for module in modules if "forward" in vars(module)}
    try:
        yield
    finally:
        for module, forward in replaced.items():
            module.forward = forward


CHANGES: dict[str, Change] = {
    "residual stream in half precision": plain_layers,
    "as it is": lambda _: nullcontext(),
    "routers in float32": float32_routers,
}
"""What is changed about the learner -> how."""


def _round(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def _outputs(choose: Callable[[Any], Sequence[nn.Module]]) -> Change:
    """Rounds what the chosen modules of every layer return."""

    def change(policy: PolicyModel) -> AbstractContextManager[Any]:
        modules = [module for layer in _layers(policy) for module in choose(layer)]
        return _hooks(modules, lambda _m, _args, output: _round(output))

    return change


def _residual(policy: PolicyModel) -> AbstractContextManager[Any]:
    def forward(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        hidden_states = _round(hidden_states + attended)
        return _round(hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states)))

    return _forwards(dict.fromkeys(_layers(policy), forward))


def _final_norm(policy: PolicyModel) -> AbstractContextManager[Any]:
    model: Any = policy.module.get_decoder()
    return _hooks([model.norm], lambda _m, _args, output: _round(output))


def _attended(policy: PolicyModel) -> AbstractContextManager[Any]:
    def forward(linear: Any, values: Tensor) -> Tensor:
        return F.linear(_round(values), linear.weight, linear.bias)

    return _forwards({layer.self_attn.o_proj: forward for layer in _layers(policy)})


def _gates(policy: PolicyModel) -> AbstractContextManager[Any]:
    gates = [layer.mlp.gate for layer in _layers(policy)]
    return _hooks(gates, lambda _m, _args, output: (_round(output[0]), _round(output[1]), *output[2:]))


ROUNDINGS: dict[str, Change] = {
    "residual stream": _residual,
    "norms before matrix products": _outputs(lambda layer: [getattr(layer, name) for name in NORMS]),
    "final norm": _final_norm,
    "queries, keys, values": _outputs(lambda layer: [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]),
    "norms of queries and keys": _outputs(lambda layer: [layer.self_attn.q_norm, layer.self_attn.k_norm]),
    "what attention returns": _attended,
    "attention's output projection": _outputs(lambda layer: [layer.self_attn.o_proj]),
    "sum over experts": _outputs(lambda layer: [layer.mlp.experts]),
    "gate weights": _gates,
}
"""What is rounded -> how."""


def _layers(policy: PolicyModel) -> list[Any]:
    return decoder_layers(policy.module)


@contextmanager
def _hooks(modules: Sequence[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other forwards for these modules; their hooks stay."""
    with _own_forwards(list(forwards)):
        for module, forward in forwards.items():
            module.forward = types.MethodType(forward, module)
        try:
            yield
        finally:
            for module in forwards:
                del module.forward
