"""Launches of `pointwise_kernels`: what lies between a decoder layer's matrix products, forward and backward.

Everything here works on contiguous float32 or half-precision rows of a GPU, and knows nothing of autograd. Needs
Triton, which comes with CUDA builds of torch only.

Shapes: T = tokens, d = hidden width, H = heads, D = head width, I = inner width, K = experts per token.
"""

# Kernels are launched by subscript, which is not typed for checkers.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
from torch import Tensor

from grpo.policy.layers.pointwise_kernels import (
    accumulate_kernel,
    combine_kernel,
    head_rotary_grad_kernel,
    head_rotary_kernel,
    rms_norm_grad_kernel,
    rms_norm_kernel,
    spread_kernel,
    swiglu_grad_kernel,
    swiglu_kernel,
)

NORM_PROGRAMS = 1056
"""Programs of a norm's gradient, 8 for each multiprocessor of an H100: each leaves a partial row to add up."""
ACCUMULATE_BLOCK = 2048
COLUMNS = 1024
"""Columns one program holds at once."""


def accumulate(total: Tensor, values: Tensor, *, add: bool) -> None:
    """total += values, or total = values, in float32, rounded to the type of `total`; contiguous, of one shape."""
    with torch.cuda.device_of(values):
        accumulate_kernel[(triton.cdiv(values.numel(), ACCUMULATE_BLOCK),)](
            total, values, values.numel(), BLOCK=ACCUMULATE_BLOCK, ADD=add
        )


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor in another type, rounded to nearest; torch's own cast moved 2.0 TB/s on an H100, this kernel
    2.9 the other way round."""
    out = torch.empty_like(x, dtype=dtype)
    accumulate(out, x, add=False)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis of [T, d], in the weight's type."""
    out = torch.empty_like(x, dtype=weight.dtype)
    width = x.shape[1]
    with torch.cuda.device_of(x):
        rms_norm_kernel[(len(x),)](x, weight, out, eps, WIDTH=width, BLOCK=triton.next_power_of_2(width))
    return out


def rms_norm_grad(x: Tensor, weight: Tensor, eps: float, grad: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [T, d], with `skip` [T, d] added, and of the weight [d]."""
    x_grad = torch.empty_like(x)
    width, programs = x.shape[1], min(len(x), NORM_PROGRAMS)
    partials = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        rms_norm_grad_kernel[(programs,)](
            x, weight, grad, skip, x_grad, partials, eps, len(x), WIDTH=width, BLOCK=triton.next_power_of_2(width)
        )
    return x_grad, partials.sum(0).to(weight.dtype)


def head_rotary(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm over each head of [T, H, D] (a weight of None: no norm), then rotation by `cos`, `sin` [T, D]."""
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        head_rotary_kernel[(len(x),)](
            x, x if weight is None else weight, cos, sin, out, eps, **_heads(x), NORM=weight is not None
        )
    return out


def head_rotary_grad(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x [T, H, D] and of the weight [D], if there is one."""
    x_grad = torch.empty_like(x)
    programs = min(len(x), NORM_PROGRAMS)
    partials = torch.empty(programs, x.shape[2], dtype=torch.float32, device=x.device)
    read = x if weight is None else weight
    with torch.cuda.device_of(x):
        head_rotary_grad_kernel[(programs,)](
            x, read, cos, sin, grad, x_grad, partials, eps, len(x), **_heads(x), NORM=weight is not None
        )
    return x_grad, None if weight is None else partials.sum(0).to(weight.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of [T, I]; both may be column ranges of one wider matrix."""
    num_rows, width = gate.shape
    out = gate.new_empty(num_rows, width)
    block = min(COLUMNS, triton.next_power_of_2(width))
    if num_rows:
        with torch.cuda.device_of(gate):
            swiglu_kernel[(num_rows, triton.cdiv(width, block))](
                gate, up, out, gate.stride(0), WIDTH=width, BLOCK=block
            )
    return out


def swiglu_grad(
    gate: Tensor, up: Tensor, grad: Tensor, gate_grad: Tensor, up_grad: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Writes the gradients of gate and up, which have their layout; returns the output [T, I] and `weights`' gradient.

    With `weights` [T] the rows are scaled further on: `grad` [T, I] is the gradient of scaled rows, the output comes
    scaled, and the weights' gradient is float32 [T]; without, it is empty.
    """
    num_rows, width = gate.shape
    out = gate.new_empty(num_rows, width)
    weights_grad = torch.empty(0 if weights is None else num_rows, dtype=torch.float32, device=gate.device)
    if num_rows:
        with torch.cuda.device_of(gate):
            swiglu_grad_kernel[(num_rows,)](
                gate,
                up,
                grad,
                grad if weights is None else weights,
                gate_grad,
                up_grad,
                out,
                weights_grad,
                gate.stride(0),
                WIDTH=width,
                BLOCK=min(COLUMNS, triton.next_power_of_2(width)),
                WEIGHTED=weights is not None,
            )
    return out, weights_grad


def spread(x: Tensor, slots: Tensor) -> Tensor:
    """rows[slots[t, k]] = x[t], the reverse of `combine`: x [T, d], `slots` integers [T, K], a permutation of T * K."""
    num_tokens, num_slots = slots.shape
    width = x.shape[1]
    rows = x.new_empty(num_tokens * num_slots, width)
    block = min(COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(x):
        spread_kernel[(num_tokens, triton.cdiv(width, block))](
            x, slots, rows, WIDTH=width, NUM_SLOTS=num_slots, BLOCK=block
        )
    return rows


def combine(rows: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
    """out[t] = sum_k weights[t, k] * rows[slots[t, k]], summed in float32 in the order of k: [T, d].

    `rows` [T * K, d]; `slots` integers [T, K]; `weights` [T, K], None = all one.
    """
    num_tokens, num_slots = slots.shape
    width = rows.shape[1]
    out = rows.new_empty(num_tokens, width)
    block = min(COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(rows):
        combine_kernel[(num_tokens, triton.cdiv(width, block))](
            rows,
            slots,
            rows if weights is None else weights,
            out,
            WIDTH=width,
            NUM_SLOTS=num_slots,
            BLOCK=block,
            WEIGHTED=weights is not None,
        )
    return out


def _heads(x: Tensor) -> dict[str, int]:
    num_heads, width = x.shape[1:]
    return {"NUM_HEADS": num_heads, "HEADS_BLOCK": triton.next_power_of_2(num_heads), "HALF": width // 2}
