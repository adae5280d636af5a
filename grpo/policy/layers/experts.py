"""The experts of a Mixture-of-Experts layer: the forward of transformers' experts modules, replaced.

Tokens are sorted by expert once; every expert's rows then lie together for three grouped matrix products forward and
the four of their gradients. Kept for backward are the layer's input, what the first product gave, and the permutation;
the activation is computed again. The gate weights' gradient comes from the inner activations, so the experts' outputs
need not be kept either. All sums are float32 and in a fixed order.

On a GPU what lies between the products runs through `grpo.policy.layers.pointwise`, elsewhere through plain torch.
Experts with biases, other layouts or other activations than SiLU take transformers' own grouped products.

Shapes: T = tokens, K = experts per token, E = experts, d = hidden width, I = inner width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import grouped_mm_experts_forward

from grpo.policy.compute_copies import ComputeCopies
from grpo.policy.layers.decoder import is_silu


def install(module: PreTrainedModel, copies: ComputeCopies) -> None:
    """Gives experts of the known layout `experts_forward`, if transformers lets experts be chosen at all.

    Where they compute with copies of their weights, the gradients are added straight to the masters'.
    """
    if not module._can_set_experts_implementation():
        return
    module.set_experts_implementation("grouped_mm")
    for experts in module.modules():
        if _is_gated_silu(experts):
            experts.forward = partial(experts_forward, copies, experts)


def experts_forward(copies: ComputeCopies, experts: Any, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """sum over k of weights[t, k] * expert[expert_ids[t, k]](hidden[t]), [T, d].

    Args:
        copies: of the model that the experts are part of.
        experts: module with `gate_up_proj` [E, 2 I, d] and `down_proj` [E, d, I].
        hidden: float [T, d].
        expert_ids: int64 [T, K], each 0..E-1.
        weights: float [T, K].
    """
    gate_up, down = experts.gate_up_proj, experts.down_proj
    masters = copies.master_of(gate_up), copies.master_of(down)
    out: Any = _Experts.apply(hidden, expert_ids, weights, gate_up, down, masters)
    return out


def _is_gated_silu(experts: Any) -> bool:
    if not hasattr(experts, "_apply_gate"):  # no experts
        return False
    is_plain = experts.has_gate and not experts.has_bias and not experts.is_transposed
    has_halves = type(experts)._apply_gate.__module__ == grouped_mm_experts_forward.__module__  # not a gate of its own
    return is_plain and has_halves and not getattr(experts, "_is_expert_parallel", False) and is_silu(experts.act_fn)


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Where each (token, slot) pair goes when all are sorted by expert, tokens in order within one.

    Returns:
        sorted row of every pair, int64 [T, K], and the end of each expert's rows, int32 [E].
    """
    keys, order = expert_ids.flatten().to(torch.int16).sort(stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=order.device)
    experts = torch.arange(num_experts, device=order.device, dtype=torch.int16)
    ends = torch.searchsorted(keys, experts, right=True, out_int32=True)
    return rows.view_as(expert_ids), ends


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        masters: tuple[nn.Parameter | None, nn.Parameter | None],
    ) -> Tensor:
        row_of_pair, ends = sort_by_expert(expert_ids, len(gate_up))
        inner = F.grouped_mm(_spread(hidden, row_of_pair), gate_up.transpose(1, 2), offs=ends)  # [T K, 2 I]
        rows = F.grouped_mm(_swiglu(inner), down.transpose(1, 2), offs=ends)  # [T K, d]
        ctx.save_for_backward(hidden, weights, gate_up, down, row_of_pair, ends, inner)
        ctx.masters = masters
        return _combine(rows, row_of_pair, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights, gate_up, down, row_of_pair, ends, inner = ctx.saved_tensors
        grad_rows = _spread(grads[0].contiguous(), row_of_pair)  # without the gate weights
        row_weights = torch.empty_like(weights.flatten()).index_copy_(0, row_of_pair.flatten(), weights.flatten())
        inner_grad, activation, row_weights_grad = _swiglu_grad(
            inner, F.grouped_mm(grad_rows, down, offs=ends), row_weights
        )
        down_grad = _weight_grad(grad_rows, activation, ends, ctx.masters[1])
        del grad_rows, activation
        rows = _spread(hidden, row_of_pair)
        gate_up_grad = _weight_grad(inner_grad, rows, ends, ctx.masters[0])
        del rows
        hidden_grad = _combine(F.grouped_mm(inner_grad, gate_up, offs=ends), row_of_pair, None)
        weights_grad = row_weights_grad[row_of_pair].to(weights.dtype)
        return hidden_grad, None, weights_grad, gate_up_grad, down_grad, None


def _weight_grad(left: Tensor, right: Tensor, ends: Tensor, master: nn.Parameter | None) -> Tensor | None:
    """left^T right over each expert's rows: [R, M], [R, N] to [E, M, N]; None where it went into the master's gradient
    without being rounded."""
    if master is None or not left.is_cuda or not _has_aligned_rows(left) or not _has_aligned_rows(right):
        return F.grouped_mm(left.t(), right, offs=ends)
    from grpo.policy.layers import grouped  # Triton comes with CUDA builds of torch only

    add = master.grad is not None
    if master.grad is None:
        master.grad = torch.empty_like(master)
    grouped.weight_grad(master.grad, left, right, ends, add=add)
    return None


def _has_aligned_rows(x: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes, as bulk copies need."""
    return x.shape[1] * x.element_size() % 16 == 0


def _swiglu(inner: Tensor) -> Tensor:
    """silu(gate) * up of [R, 2 I], whose rows hold gate and up side by side."""
    gate, up = inner.chunk(2, dim=1)
    if not inner.is_cuda:
        return F.silu(gate) * up
    from grpo.policy.layers import pointwise  # Triton comes with CUDA builds of torch only

    return pointwise.swiglu(gate, up)


def _swiglu_grad(inner: Tensor, grad: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `inner` [R, 2 I], weighted activations [R, I], and the gradient of `weights` [R].

    `grad` [R, I] is the gradient of the activations once they are weighted.
    """
    gate, up = inner.chunk(2, dim=1)
    inner_grad = torch.empty_like(inner)
    gate_grad, up_grad = inner_grad.chunk(2, dim=1)
    if inner.is_cuda:
        from grpo.policy.layers import pointwise

        return inner_grad, *pointwise.swiglu_grad(gate, up, grad, gate_grad, up_grad, weights)
    sigmoid = gate.sigmoid()
    silu, column = gate * sigmoid, weights[:, None]
    torch.mul(grad * column * up, sigmoid * (1 + gate - silu), out=gate_grad)
    torch.mul(grad * column, silu, out=up_grad)
    return inner_grad, silu * up * column, (grad * silu * up).sum(1)


def _spread(x: Tensor, row_of_pair: Tensor) -> Tensor:
    """rows[row_of_pair[t, k]] = x[t]: [T, d] to [T K, d]."""
    if x.is_cuda:
        from grpo.policy.layers import pointwise

        return pointwise.spread(x.contiguous(), row_of_pair)
    rows = x.new_empty(row_of_pair.numel(), x.shape[1])
    rows[row_of_pair] = x[:, None]
    return rows


def _combine(rows: Tensor, row_of_pair: Tensor, weights: Tensor | None) -> Tensor:
    """Sum over k of weights[t, k] * rows[row_of_pair[t, k]]: [T, d]."""
    if rows.is_cuda:
        from grpo.policy.layers import pointwise

        return pointwise.combine(rows, row_of_pair, weights)
    gathered = rows[row_of_pair].float() if rows.dtype in (torch.bfloat16, torch.float16) else rows[row_of_pair]
    total = gathered.sum(1) if weights is None else (gathered * weights[:, :, None]).sum(1)
    return total.to(rows.dtype)
