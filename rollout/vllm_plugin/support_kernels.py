"""Lays what a step leaves behind into one array, in Triton: the kept ids of its rows, and the routes of its tokens.

Imported on a GPU only; `rollout/vllm_plugin/draw.py` launches it. Log-probabilities are there already. A row whose ids
were not gathered, or have no room, leaves a bit per id of the vocabulary.

Shapes: B = rows, R = request slots, V = vocabulary, T = tokens, E = expert ids of a token.
"""

# ruff: noqa: PLR0913  the parameters are the kernels' own
# pyright: reportMissingImports=false, reportInvalidTypeForm=false
# Launches and the kernel language are not typed for checkers.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from rollout.vllm_plugin.wide_kernels import write_bits


@triton.jit(do_not_specialize=["slots_at", "routes_at", "ids_at", "num_rows", "room", "num_tokens"])
def pack_step(
    logits_ptr,  # float [B, V]
    logits_stride,
    slots_ptr,  # int32 [B], each row's request slot
    temperature_ptr,  # float32 [R]
    num_sampled_ptr,  # int32 [B]: 0 = nothing was sampled, nothing is recorded
    thetas_ptr,  # float32 [B]
    lasts_ptr,  # int32 [B]
    sizes_ptr,  # int32 [B]; negative = the row's ids are not gathered
    kept_ptr,  # int32 [B, WIDTH]
    bits_ptr,  # uint8 [B, ceil(V / 8)], written where a packed size is negative: the kept set, lowest bit first
    bits_stride,
    cache_slots_ptr,  # int64 [T], the tokens' cache slots
    routes_ptr,  # int32 [T, E]
    packed_ptr,  # int32, written: first the sizes; then the other parts, that begin at
    slots_at,
    routes_at,
    ids_at,
    num_rows,
    room,
    vocab_size,
    num_tokens,
    routes_per_token,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    RECORD: tl.constexpr,
    ROUTE_BYTES: tl.constexpr,
):
    """A row, or a block of the routes; grid (B + ceil(T * E / BLOCK),)."""
    program = tl.program_id(0)
    if program < num_rows:
        if RECORD:
            row = program.to(tl.int64)
            before = _sum_sizes(sizes_ptr, num_sampled_ptr, row, BLOCK)
            size = tl.where(tl.load(num_sampled_ptr + row) > 0, tl.load(sizes_ptr + row), 0)
            fits = (size >= 0) & (before + size <= room)
            tl.store(packed_ptr + row, tl.where(fits, size, -tl.abs(size)))
            if fits:
                for i in range(0, size, BLOCK):
                    lanes = i + tl.arange(0, BLOCK)
                    ids = tl.load(kept_ptr + row * WIDTH + lanes, mask=lanes < size)
                    tl.store(packed_ptr + ids_at + before + lanes, ids, mask=lanes < size)
            else:
                temperature = tl.load(temperature_ptr + tl.load(slots_ptr + row))
                logits, bits = logits_ptr + row * logits_stride, bits_ptr + row * bits_stride
                theta, last = tl.load(thetas_ptr + row), tl.load(lasts_ptr + row)
                write_bits(logits, bits, temperature, theta, last, vocab_size, BLOCK)
    elif ROUTE_BYTES > 0:
        at = (program - num_rows) * BLOCK + tl.arange(0, BLOCK)
        slots = tl.load(cache_slots_ptr + at, mask=at < num_tokens)
        tl.store((packed_ptr + slots_at).to(tl.pointer_type(tl.int64)) + at, slots, mask=at < num_tokens)
        there = at < num_tokens * routes_per_token
        routes = tl.load(routes_ptr + at, mask=there)
        if ROUTE_BYTES == 1:
            tl.store((packed_ptr + routes_at).to(tl.pointer_type(tl.uint8)) + at, routes.to(tl.uint8), mask=there)
        else:
            tl.store((packed_ptr + routes_at).to(tl.pointer_type(tl.uint16)) + at, routes.to(tl.uint16), mask=there)


@triton.jit
def _sum_sizes(sizes_ptr, num_sampled_ptr, stop, BLOCK: tl.constexpr):
    """The ids of all rows before `stop`."""
    total = tl.zeros((), tl.int32)
    for i in range(0, stop, BLOCK):
        others = i + tl.arange(0, BLOCK)
        counts = (others < stop) & (tl.load(num_sampled_ptr + others, mask=others < stop, other=0) > 0)
        total += tl.sum(tl.abs(tl.load(sizes_ptr + others, mask=counts, other=0)))
    return total
