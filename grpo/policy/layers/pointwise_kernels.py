"""Triton kernels for what lies between a decoder layer's matrix products: RMSNorm, rotary positions, SwiGLU, and the
sum over a token's experts.

Every kernel reads and writes rows once, computes in float32 and rounds once per result. Gradients of a norm's weight
leave one partial row per program, which the caller adds in a fixed order: two runs give the same bits.
"""

# Triton comes with CUDA builds of torch only; its kernel language is not typed for checkers.
# pyright: reportMissingImports=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# ruff: noqa: PLR0913  a kernel takes its tensors one by one
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out = weight * round(x / rms(x)), rounded to x's type and then to out's: one row per program."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x) / WIDTH + eps)
    out = normed.to(x_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(out_ptr + row + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_grad_kernel(
    x_ptr,
    weight_ptr,
    grad_ptr,
    skip_ptr,
    x_grad_ptr,
    partial_ptr,
    eps,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of `rms_norm_kernel` plus `skip`, the gradient that reaches x around the norm; every program takes each
    `num_programs`-th row."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    weight_grad = tl.zeros([BLOCK], tl.float32)
    row = tl.program_id(0).to(tl.int64) * WIDTH + column
    for _ in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row, mask=inside, other=0.0).to(tl.float32)
        skip = tl.load(skip_ptr + row, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x) / WIDTH + eps)
        normed = x * scale
        weight_grad += grad * normed
        grad *= weight
        x_grad = scale * (grad - normed * (tl.sum(grad * normed) / WIDTH)) + skip
        tl.store(x_grad_ptr + row, x_grad.to(x_grad_ptr.dtype.element_ty), mask=inside)
        row += tl.num_programs(0) * WIDTH
    tl.store(partial_ptr + tl.program_id(0) * WIDTH + column, weight_grad, mask=inside)


@triton.jit
def accumulate_kernel(total_ptr, values_ptr, num_elements, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """total = values, or total += values with ADD."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    total = tl.load(values_ptr + at, mask=inside).to(tl.float32)
    if ADD:
        total += tl.load(total_ptr + at, mask=inside)
    tl.store(total_ptr + at, total, mask=inside)


@triton.jit
def _head_tile(token, NUM_HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr):
    """Where the lower halves of a token's heads are, and which of the tile's heads exist."""
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, HALF)[None, :]
    return (token.to(tl.int64) * NUM_HEADS + head) * (2 * HALF) + column, (head < NUM_HEADS) & (column < HALF)


@triton.jit
def _angles(cos_ptr, sin_ptr, token, HALF: tl.constexpr):
    """cos and sin of the lower and the upper half, float32 [1, HALF] each."""
    at = token.to(tl.int64) * (2 * HALF) + tl.arange(0, HALF)[None, :]
    cos_low, cos_high = tl.load(cos_ptr + at).to(tl.float32), tl.load(cos_ptr + at + HALF).to(tl.float32)
    sin_low, sin_high = tl.load(sin_ptr + at).to(tl.float32), tl.load(sin_ptr + at + HALF).to(tl.float32)
    return cos_low, cos_high, sin_low, sin_high


@triton.jit
def _head_scale(low, high, eps, HALF: tl.constexpr):
    """1 / rms of each head, [HEADS_BLOCK, 1]."""
    return tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]


@triton.jit
def head_rotary_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    eps,
    NUM_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
):
    """RMSNorm of every head (if NORM), then rotation by position: one token per program."""
    token = tl.program_id(0)
    at, inside = _head_tile(token, NUM_HEADS, HEADS_BLOCK, HALF)
    low = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    if NORM:
        scale = _head_scale(low, high, eps, HALF)
        column = tl.arange(0, HALF)[None, :]
        weight_low = tl.load(weight_ptr + column).to(tl.float32)
        weight_high = tl.load(weight_ptr + HALF + column).to(tl.float32)
        low = ((low * scale).to(dtype).to(tl.float32) * weight_low).to(dtype).to(tl.float32)
        high = ((high * scale).to(dtype).to(tl.float32) * weight_high).to(dtype).to(tl.float32)
    cos_low, cos_high, sin_low, sin_high = _angles(cos_ptr, sin_ptr, token, HALF)
    tl.store(out_ptr + at, (low * cos_low - high * sin_low).to(dtype), mask=inside)
    tl.store(out_ptr + at + HALF, (high * cos_high + low * sin_high).to(dtype), mask=inside)


@triton.jit
def head_rotary_grad_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    grad_ptr,
    x_grad_ptr,
    partial_ptr,
    eps,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
):
    """Gradient of `head_rotary_kernel`; every program takes each `num_programs`-th token."""
    column = tl.arange(0, HALF)[None, :]
    dtype = x_grad_ptr.dtype.element_ty
    sum_low = tl.zeros([HEADS_BLOCK, HALF], tl.float32)
    sum_high = tl.zeros([HEADS_BLOCK, HALF], tl.float32)
    token = tl.program_id(0).to(tl.int64)
    for _ in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        at, inside = _head_tile(token, NUM_HEADS, HEADS_BLOCK, HALF)
        cos_low, cos_high, sin_low, sin_high = _angles(cos_ptr, sin_ptr, token, HALF)
        out_low = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        out_high = tl.load(grad_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
        low = out_low * cos_low + out_high * sin_high
        high = out_high * cos_high - out_low * sin_low
        if NORM:
            x_low = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            x_high = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
            scale = _head_scale(x_low, x_high, eps, HALF)
            x_low *= scale
            x_high *= scale
            sum_low += low * x_low
            sum_high += high * x_high
            low *= tl.load(weight_ptr + column).to(tl.float32)
            high *= tl.load(weight_ptr + HALF + column).to(tl.float32)
            mean = ((tl.sum(low * x_low, 1) + tl.sum(high * x_high, 1)) / (2 * HALF))[:, None]
            low = scale * (low - x_low * mean)
            high = scale * (high - x_high * mean)
        tl.store(x_grad_ptr + at, low.to(dtype), mask=inside)
        tl.store(x_grad_ptr + at + HALF, high.to(dtype), mask=inside)
        token += tl.num_programs(0)
    if NORM:
        partial = partial_ptr + tl.program_id(0) * (2 * HALF) + tl.arange(0, HALF)
        tl.store(partial, tl.sum(sum_low, 0))
        tl.store(partial + HALF, tl.sum(sum_high, 0))


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, in_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out = silu(gate) * up: grid (rows, blocks of columns); gate and up may be halves of wider rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_ptr + row * in_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * in_stride + column, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_grad_kernel(
    gate_ptr,
    up_ptr,
    grad_ptr,
    weight_ptr,
    gate_grad_ptr,
    up_grad_ptr,
    out_ptr,
    weight_grad_ptr,
    in_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Gradients of `swiglu_kernel`, and its output once more: one row per program.

    With WEIGHTED the row is scaled by its weight further on: `grad` is that of the scaled row, `out` is written scaled,
    and the weight's own gradient comes out too.
    """
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weight_ptr + row).to(tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        gate = tl.load(gate_ptr + row * in_stride + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * in_stride + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        products += grad * silu * up
        grad *= weight
        gate_grad = grad * up * sigmoid * (1 + gate - silu)
        dtype = out_ptr.dtype.element_ty
        tl.store(gate_grad_ptr + row * in_stride + column, gate_grad.to(dtype), mask=inside)
        tl.store(up_grad_ptr + row * in_stride + column, (grad * silu).to(dtype), mask=inside)
        tl.store(out_ptr + row * WIDTH + column, (silu * up * weight).to(dtype), mask=inside)
    if WEIGHTED:
        tl.store(weight_grad_ptr + row, tl.sum(products))


@triton.jit
def spread_kernel(x_ptr, slots_ptr, rows_ptr, WIDTH: tl.constexpr, NUM_SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """rows[slot] = x[t] for every slot of the token: grid (tokens, columns). Each row of x is read once, where a gather
    by slot would read it from memory for every slot."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(x_ptr + token * WIDTH + column, mask=inside)
    for slot in tl.static_range(NUM_SLOTS):
        row = tl.load(slots_ptr + token * NUM_SLOTS + slot).to(tl.int64)
        tl.store(rows_ptr + row * WIDTH + column, values, mask=inside)


@triton.jit
def combine_kernel(
    rows_ptr,
    slots_ptr,
    weights_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """out[t] = sum of rows[slot] over the token's slots, times their weights if WEIGHTED: grid (tokens, columns)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(NUM_SLOTS):
        row = tl.load(slots_ptr + token * NUM_SLOTS + slot).to(tl.int64)
        values = tl.load(rows_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weights_ptr + token * NUM_SLOTS + slot).to(tl.float32)
        total += values
    tl.store(out_ptr + token * WIDTH + column, total.to(out_ptr.dtype.element_ty), mask=inside)
