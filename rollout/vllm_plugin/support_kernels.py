"""What a step's sampling leaves behind, in one walk over its logits, in Triton.

Imported on a GPU only; `rollout/vllm_plugin/support.py` launches it. A row is read by several programs at once, each a
chunk of the vocabulary. A second kernel joins what they found, walks a row again only if its ids have no room, and lays
the step's routes beside them.

Shapes: B = rows, V = vocabulary, S = chunks of a row, T = tokens, R = expert ids of a token.
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
    vocab_size,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    RECORD: tl.constexpr,
):
    """One chunk of one row; grid (B, S). Most blocks of a truncated row are empty: nothing is done for them."""
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
        highest = tl.max(x)
        if highest > float("-inf"):
            above = tl.maximum(maximum, highest)
            total = total * tl.exp(maximum - above) + tl.sum(tl.exp(x - above))
            maximum = above
            if RECORD:
                if records:
                    keep = (x > float("-inf")).to(tl.int32)
                    place = count + tl.cumsum(keep, axis=0) - keep
                    tl.store(ids_ptr + chunk * WIDTH + place, ids, mask=(keep > 0) & (place < WIDTH))
                    count += tl.sum(keep)
    tl.store(sums_ptr + chunk * 2, maximum)
    tl.store(sums_ptr + chunk * 2 + 1, total)
    tl.store(counts_ptr + chunk, count)


@triton.jit(do_not_specialize=["logprobs_at", "slots_at", "routes_at", "ids_at", "num_rows", "room", "num_tokens"])
def finish_step(
    logits_ptr,  # float [B, V]
    logits_stride,
    sampled_ptr,  # int64 [B]
    sums_ptr,  # float32 [B, S, 2]
    counts_ptr,  # int32 [B, S]
    chunk_ids_ptr,  # int32 [B, S, WIDTH]
    bits_ptr,  # uint8 [B, ceil(V / 8)], written where a size is negative: the support, lowest bit first
    bits_stride,
    slots_ptr,  # int64 [T]
    routes_ptr,  # int32 [T, R]
    packed_ptr,  # int32, written; its parts begin at
    logprobs_at,
    slots_at,
    routes_at,
    ids_at,
    num_rows,
    num_chunks,
    room,
    vocab_size,
    num_tokens,
    routes_per_token,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    RECORD: tl.constexpr,
    ROUTE_BYTES: tl.constexpr,
):
    """A row, or a block of the routes; grid (B + ceil(T * R / BLOCK),)."""
    program = tl.program_id(0)
    if program < num_rows:
        row = program.to(tl.int64)
        logits = logits_ptr + row * logits_stride
        logprobs_ptr = (packed_ptr + logprobs_at).to(tl.pointer_type(tl.float32))
        _join_sums(logits, sampled_ptr + row, sums_ptr + row * num_chunks * 2, logprobs_ptr + row, num_chunks, CHUNKS)
        if RECORD:
            counts, bits = counts_ptr + row * num_chunks, bits_ptr + row * bits_stride
            chunk_ids = chunk_ids_ptr + row * num_chunks * WIDTH
            before = _sum_before(counts_ptr, row * num_chunks)
            fits = _join_ids(
                counts, chunk_ids, packed_ptr + row, packed_ptr + ids_at, before, num_chunks, room, CHUNKS, WIDTH
            )
            if not fits:
                _write_bits(logits, bits, vocab_size, BLOCK)
    elif ROUTE_BYTES > 0:
        at = (program - num_rows) * BLOCK + tl.arange(0, BLOCK)
        slots = tl.load(slots_ptr + at, mask=at < num_tokens)
        tl.store((packed_ptr + slots_at).to(tl.pointer_type(tl.int64)) + at, slots, mask=at < num_tokens)
        there = at < num_tokens * routes_per_token
        routes = tl.load(routes_ptr + at, mask=there)
        if ROUTE_BYTES == 1:
            tl.store((packed_ptr + routes_at).to(tl.pointer_type(tl.uint8)) + at, routes.to(tl.uint8), mask=there)
        else:
            tl.store((packed_ptr + routes_at).to(tl.pointer_type(tl.uint16)) + at, routes.to(tl.uint16), mask=there)


@triton.jit
def _join_sums(logits_ptr, sampled_ptr, sums_ptr, logprob_ptr, num_chunks, CHUNKS: tl.constexpr):
    """The log-probability of a row's sampled id. CHUNKS is S rounded up to a power of two."""
    chunks = tl.arange(0, CHUNKS)
    maxima = tl.load(sums_ptr + chunks * 2, mask=chunks < num_chunks, other=float("-inf"))
    totals = tl.load(sums_ptr + chunks * 2 + 1, mask=chunks < num_chunks, other=0.0)
    maximum = tl.max(maxima)
    logsumexp = maximum + tl.log(tl.sum(totals * tl.exp(maxima - maximum)))
    tl.store(logprob_ptr, tl.load(logits_ptr + tl.load(sampled_ptr)).to(tl.float32) - logsumexp)


@triton.jit
def _sum_before(counts_ptr, stop):
    """The ids of all rows before."""
    total = tl.zeros((), tl.int32)
    for i in range(0, stop, 1024):
        others = i + tl.arange(0, 1024)
        total += tl.sum(tl.load(counts_ptr + others, mask=others < stop, other=0))
    return total


@triton.jit
def _join_ids(
    counts_ptr,
    chunk_ids_ptr,
    size_ptr,
    ids_ptr,
    before,
    num_chunks,
    room,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes a row's size, and its ids behind the `before` of other rows. False, and the size negative, if no room."""
    chunks = tl.arange(0, CHUNKS)
    counts = tl.load(counts_ptr + chunks, mask=chunks < num_chunks, other=0)
    size, most = tl.sum(counts), tl.max(counts)
    fits = (size == 0) | ((most <= WIDTH) & (before + size <= room))
    tl.store(size_ptr, tl.where(fits, size, -size))
    firsts = before + tl.cumsum(counts, axis=0) - counts
    for i in range(0, tl.where(fits, most, 0), 32):
        lanes = i + tl.arange(0, 32)
        there = lanes[None, :] < counts[:, None]
        ids = tl.load(chunk_ids_ptr + chunks[:, None] * WIDTH + lanes[None, :], mask=there)
        tl.store(ids_ptr + firsts[:, None] + lanes[None, :], ids, mask=there)
    return fits


@triton.jit
def _write_bits(logits_ptr, bits_ptr, vocab_size, BLOCK: tl.constexpr):
    """A bit per id of a row's vocabulary."""
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        keep = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf")) > float("-inf")
        bits = tl.sum(tl.reshape(keep.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :], axis=1)
        byte = start // 8 + tl.arange(0, BLOCK // 8)
        tl.store(bits_ptr + byte, bits.to(tl.uint8), mask=byte * 8 < vocab_size)
