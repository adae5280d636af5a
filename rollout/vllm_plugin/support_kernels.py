"""Log-probabilities and supports of a step's sampling in one walk over its logits, in Triton.

Imported on a GPU only; `rollout/vllm_plugin/support.py` launches it. A row is walked by several programs at once, each
over a chunk of the vocabulary; a second kernel joins what they found.

Shapes: B = rows, V = vocabulary, S = chunks of a row, N = room for ids.
"""

# ruff: noqa: PLR0913, SIM102  the parameters are the kernels' own; a constant is tested apart from what is computed
# pyright: reportMissingImports=false, reportInvalidTypeForm=false
# Launches and the kernel language are not typed for checkers.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scan_chunks(
    logits_ptr,  # float [B, V]; -inf = removed by truncation
    logits_stride,
    truncates_ptr,  # int32 [B]: 0 = the row's support is the vocabulary and is not recorded
    num_sampled_ptr,  # int32 [B]: 0 = nothing was sampled
    sums_ptr,  # float32 [B, S, 2], written: maximum and sum of exp(logit - maximum)
    counts_ptr,  # int32 [B, S], written: ids of finite logit
    ids_ptr,  # int32 [B, S, WIDTH], written: the first of them
    bits_ptr,  # uint8 [B, ceil(V / 8)], written: all of them, lowest bit first
    bits_stride,
    vocab_size,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    RECORD: tl.constexpr,
):
    """One chunk of one row; grid (B, S)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = row * tl.num_programs(1) + tl.program_id(1)
    start = tl.program_id(1) * CHUNK
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    count = tl.zeros((), tl.int32)
    if RECORD:
        records = (tl.load(truncates_ptr + row) != 0) & (tl.load(num_sampled_ptr + row) > 0)
    for i in range(0, CHUNK, BLOCK):
        ids = start + i + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        above = tl.maximum(maximum, tl.max(x))
        base = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(maximum - base) + tl.sum(tl.exp(x - base))
        maximum = above
        if RECORD:
            if records:
                keep = (x > float("-inf")).to(tl.int32)
                bits = tl.sum(tl.reshape(keep, (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :], axis=1)
                byte = (start + i) // 8 + tl.arange(0, BLOCK // 8)
                tl.store(bits_ptr + row * bits_stride + byte, bits.to(tl.uint8), mask=byte * 8 < vocab_size)
                found = tl.sum(keep)
                if found > 0:
                    place = count + tl.cumsum(keep, axis=0) - keep
                    tl.store(ids_ptr + chunk * WIDTH + place, ids, mask=(keep > 0) & (place < WIDTH))
                count += found
    tl.store(sums_ptr + chunk * 2, maximum)
    tl.store(sums_ptr + chunk * 2 + 1, total)
    tl.store(counts_ptr + chunk, count)


@triton.jit
def join_chunks(
    logits_ptr,  # float [B, V]
    logits_stride,
    sampled_ptr,  # int64 [B]
    sums_ptr,  # float32 [B, S, 2]
    counts_ptr,  # int32 [B, S]
    ids_ptr,  # int32 [B, S, WIDTH]
    logprobs_ptr,  # float32 [B], written
    sizes_ptr,  # int32 [B], written: the support's size, negative if a chunk had more ids than room
    flat_ptr,  # int32 [N], written: the supports of all rows, one after the other, as far as there is room
    num_chunks,
    room,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    RECORD: tl.constexpr,
):
    """One row; grid (B,). CHUNKS is S rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    mine = chunks < num_chunks
    maxima = tl.load(sums_ptr + (row * num_chunks + chunks) * 2, mask=mine, other=float("-inf"))
    totals = tl.load(sums_ptr + (row * num_chunks + chunks) * 2 + 1, mask=mine, other=0.0)
    maximum = tl.max(maxima)
    logsumexp = maximum + tl.log(tl.sum(totals * tl.exp(maxima - maximum)))
    logit = tl.load(logits_ptr + row * logits_stride + tl.load(sampled_ptr + row)).to(tl.float32)
    tl.store(logprobs_ptr + row, logit - logsumexp)
    if RECORD:
        counts = tl.load(counts_ptr + row * num_chunks + chunks, mask=mine, other=0)
        size, most = tl.sum(counts), tl.max(counts)
        tl.store(sizes_ptr + row, tl.where(most > WIDTH, -size, size))
        before = tl.zeros((), tl.int32)
        for i in range(0, row * num_chunks, 1024):
            others = i + tl.arange(0, 1024)
            before += tl.sum(tl.load(counts_ptr + others, mask=others < row * num_chunks, other=0))
        firsts = before + tl.cumsum(counts, axis=0) - counts
        for i in range(0, tl.minimum(most, WIDTH), 32):
            lanes = i + tl.arange(0, 32)
            there = (lanes[None, :] < counts[:, None]) & (lanes[None, :] < WIDTH)
            ids = tl.load(ids_ptr + (row * num_chunks + chunks[:, None]) * WIDTH + lanes[None, :], mask=there)
            place = firsts[:, None] + lanes[None, :]
            tl.store(flat_ptr + place, ids, mask=there & (place < room))
