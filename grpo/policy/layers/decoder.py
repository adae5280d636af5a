"""Decoder layers on a GPU in half precision: the plain layer's arithmetic in few kernels, keeping little for backward.

Two autograd functions hold a layer's dense parts: norm + query/key/value + rotary, and norm + gated MLP. Each keeps its
input and what its matrix products gave; norms and activations are computed again in the backward pass, which costs
little. The residual stream between the layers stays in float32, as in the engine: in half precision every layer would
cut the whole sum, which is the largest part of the rounding in a log-probability (docs/performance.md). Routers,
experts (`grpo.policy.layers.experts`) and attention stay modules and functions of their own, so that routing replay,
FSDP2 and activation checkpointing work as on the plain layer.

`install` replaces the forward of layers it knows. It answers packed rows in half precision on a GPU, the plain forward
everything else: the start-up check of a learner on a GPU therefore compares the two (`check.check_packing`).

Shapes: T = packed tokens, d = hidden width, H = heads, G = key/value heads, D = head width, I = inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.policy.layers.attention import PackedLayout, attend
from stability.keep_routing import decoder_layers

KNOWN_LAYERS = frozenset(f"{family}DecoderLayer" for family in ("Llama", "Mistral", "Mixtral", "Qwen3", "Qwen3Moe"))
"""Pre-norm residual layers of this structure: rotary attention without biases, RMSNorm with a plain weight."""


def install(module: PreTrainedModel) -> None:
    """Gives the decoder layers, and the norm after the last one, their fused forward if all of them are known."""
    layers: list[Any] = decoder_layers(module)
    norm: Any = getattr(module.get_decoder(), "norm", None)
    if not all(_is_known(layer) for layer in layers) or type(norm) is not type(layers[-1].input_layernorm):
        return
    for layer in layers:
        layer.forward = partial(_layer_forward, layer, layer.forward)
    norm.forward = partial(_norm_forward, norm, norm.forward)


def _is_known(layer: nn.Module) -> bool:
    attention: Any = getattr(layer, "self_attn", None)
    if type(layer).__name__ not in KNOWN_LAYERS or attention is None:
        return False
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    width = attention.head_dim
    return all(p.bias is None for p in projections) and width & (width - 1) == 0


def _layer_forward(
    layer: Any, plain: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    layout: PackedLayout | None = kwargs.get("packed_layout")
    if layout is None or not _is_half_on_gpu(layer.input_layernorm.weight):
        return plain(hidden_states, *args, **kwargs)
    stream = hidden_states.squeeze(0).float()
    return fused_layer(layer, stream, kwargs["position_embeddings"], layout).unsqueeze(0)


def _norm_forward(norm: Any, plain: Callable[..., Tensor], hidden_states: Tensor) -> Tensor:
    if len(hidden_states) != 1 or not _is_half_on_gpu(norm.weight):
        return plain(hidden_states)
    return _apply(_Norm, hidden_states.squeeze(0), norm.weight, norm.variance_epsilon)[0].unsqueeze(0)


def _is_half_on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)


def fused_layer(layer: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], layout: PackedLayout) -> Tensor:
    """The residual stream after the layer, float32 [T, d] like the one before it, for one packed row.

    `position_embeddings` are cos and sin [1, T, D], in the weights' type.
    """
    attention, mlp = layer.self_attn, layer.mlp
    cos, sin = (angles[0].contiguous() for angles in position_embeddings)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    query, key, value, hidden = _apply(
        _QueryKeyValue,
        hidden,
        layer.input_layernorm.weight,
        *(projection.weight for projection in (attention.q_proj, attention.k_proj, attention.v_proj)),
        *(None if norm is None else norm.weight for norm in norms),
        cos,
        sin,
        layer.input_layernorm.variance_epsilon,
        attention.head_dim,
    )
    sliding_window = getattr(attention, "sliding_window", None)
    attended = attend(query, key, value, layout, attention.scaling, sliding_window)
    hidden = _apply(_AddProjection, hidden, attended.flatten(1), attention.o_proj.weight)
    norm = layer.post_attention_layernorm
    if _is_gated_mlp(mlp):
        projections = (projection.weight for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        return _apply(_GatedMlp, hidden, norm.weight, *projections, norm.variance_epsilon)
    normed, hidden = _apply(_Norm, hidden, norm.weight, norm.variance_epsilon)
    return hidden + mlp(normed.unsqueeze(0)).squeeze(0)


def is_silu(activation: object) -> bool:
    """Whether a module or function is x * sigmoid(x)."""
    return type(activation).__name__ in ("SiLU", "SiLUActivation") or activation is nn.functional.silu


def _is_gated_mlp(mlp: Any) -> bool:
    projections = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(isinstance(p, nn.Linear) and p.bias is None for p in projections) and is_silu(mlp.act_fn)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)


class _AddProjection(torch.autograd.Function):
    """stream + x W^T: float32 [T, d] + [T, I] x [d, I], the product never rounded to half precision."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _add_product(stream, x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        return grads[0], grad @ weight, grad.t() @ x


def _add_product(stream: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if stream.is_cuda and stream.dtype != left.dtype:
        return torch.addmm(stream, left, right, out_dtype=stream.dtype)
    return torch.addmm(stream, left.to(stream.dtype), right.to(stream.dtype))


class _Norm(torch.autograd.Function):
    """RMSNorm of a stream float32 [T, d], in the weight's type.

    Also hands its input on, so that the gradient around the norm is added in the same kernel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        from grpo.policy.layers import pointwise  # Triton comes with CUDA builds of torch only

        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return pointwise.rms_norm(x, weight, eps), x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from grpo.policy.layers import pointwise

        x, weight = ctx.saved_tensors
        grad, skip = (g.contiguous() for g in grads)
        return *pointwise.rms_norm_grad(x, weight, ctx.eps, grad, skip), None


class _QueryKeyValue(torch.autograd.Function):
    """Stream float32 [T, d] to rotated query [T, H, D] and key [T, G, D], value [T, G, D], and itself handed on."""

    @staticmethod
    def forward(  # noqa: PLR0913  autograd takes no containers of tensors
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        to_query: Tensor,
        to_key: Tensor,
        to_value: Tensor,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        head_dim: int,
    ) -> tuple[Tensor, ...]:
        from grpo.policy.layers import pointwise

        normed = pointwise.rms_norm(x, norm, eps)
        query, key, value = ((normed @ w.t()).unflatten(1, (-1, head_dim)) for w in (to_query, to_key, to_value))
        ctx.save_for_backward(x, norm, to_query, to_key, to_value, query_norm, key_norm, cos, sin, query, key)
        ctx.eps = eps
        rotated = (
            pointwise.head_rotary(query, query_norm, eps, cos, sin),
            pointwise.head_rotary(key, key_norm, eps, cos, sin),
        )
        return *rotated, value, x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from grpo.policy.layers import pointwise

        x, norm, to_query, to_key, to_value, query_norm, key_norm, cos, sin, query, key = ctx.saved_tensors
        query_grad, key_grad, value_grad, skip = (grad.contiguous() for grad in grads)
        query_grad, query_norm_grad = pointwise.head_rotary_grad(query, query_norm, ctx.eps, cos, sin, query_grad)
        key_grad, key_norm_grad = pointwise.head_rotary_grad(key, key_norm, ctx.eps, cos, sin, key_grad)
        parts = [grad.flatten(1) for grad in (query_grad, key_grad, value_grad)]
        normed = pointwise.rms_norm(x, norm, ctx.eps)
        weight_grads = [part.t() @ normed for part in parts]
        normed_grad = parts[0] @ to_query
        normed_grad.addmm_(parts[1], to_key).addmm_(parts[2], to_value)
        x_grad, norm_grad = pointwise.rms_norm_grad(x, norm, ctx.eps, normed_grad, skip)
        return x_grad, norm_grad, *weight_grads, query_norm_grad, key_norm_grad, None, None, None, None


class _GatedMlp(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) * up(norm(x))) of a stream x, float32 [T, d]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, to_gate: Tensor, to_up: Tensor, to_out: Tensor, eps: float
    ) -> Tensor:
        from grpo.policy.layers import pointwise

        normed = pointwise.rms_norm(x, norm, eps)
        gate, up = normed @ to_gate.t(), normed @ to_up.t()
        ctx.save_for_backward(x, norm, to_gate, to_up, to_out, gate, up)
        ctx.eps = eps
        return _add_product(x, pointwise.swiglu(gate, up), to_out.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from grpo.policy.layers import pointwise

        x, norm, to_gate, to_up, to_out, gate, up = ctx.saved_tensors
        skip = grads[0].contiguous()
        grad = skip.to(to_out.dtype)
        gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(up)
        inner, _ = pointwise.swiglu_grad(gate, up, grad @ to_out, gate_grad, up_grad)
        out_weight_grad = grad.t() @ inner
        normed = pointwise.rms_norm(x, norm, ctx.eps)
        weight_grads = gate_grad.t() @ normed, up_grad.t() @ normed
        normed_grad = (gate_grad @ to_gate).addmm_(up_grad, to_up)
        x_grad, norm_grad = pointwise.rms_norm_grad(x, norm, ctx.eps, normed_grad, skip)
        return x_grad, norm_grad, *weight_grads, out_weight_grad, None
