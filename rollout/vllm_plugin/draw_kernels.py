"""Truncation and the draw of a step, in Triton: logits in; tokens, their log-probabilities and the step's record out.

Imported on a GPU only; `rollout/vllm_plugin/draw.py` launches it. The logits are read once and never written:

1. `guess_cuts` looks at a sample of each row and guesses a logit that some 1500 of the row's ids exceed.
2. `scan_chunks` reads every row, several programs side by side, each a chunk of the vocabulary. It finds the
   normaliser, and marks the ids above the cut as candidates. A row that does not truncate is drawn from here already.
3. `draw_rows` truncates each row's candidates, draws, and records (`support_kernels.py`). If the kept set may reach
   below the cut, or there is no room for the candidates, the row is walked instead (`wide_kernels.py`). So the cut
   decides about speed, not about a set.

A kept set is the smallest set of likeliest ids that reaches top-k, and then, of what is left, the smallest whose mass
reaches top-p; of equally likely ids the lowest go in first. It is told by two numbers: an id is kept if its logit is
above `theta`, or equals it and the id is at most `last`.

Noise and tie rule of the draw are vLLM's, by its own function. Logits are divided by the temperature wherever they are
read; at temperature 0 they are left alone and the draw is the arg max, as in vLLM.

Parameters come in the order of `rollout.vllm_plugin.launch.Launcher`: tensors of the step, its numbers, what stays,
constants. What changes from step to step is not specialised by, but for the logits.

Shapes: B = rows, R = request slots, V = vocabulary, S = chunks of a row, W = their ids / 32, T = tokens, E = expert ids
of a token.
"""

# ruff: noqa: PLR0913  the parameters are the kernels' own
# pyright: reportMissingImports=false, reportInvalidTypeForm=false
# Launches and the kernel language are not typed for checkers.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from vllm.v1.worker.gpu.sample.gumbel import murmur3_uniform32

from rollout.vllm_plugin.order_kernels import find_theta, is_kept, list_marks, load_scaled, truncate
from rollout.vllm_plugin.support_kernels import copy_routes, copy_slots, place_ids, store_row
from rollout.vllm_plugin.wide_kernels import draw_best, draw_from_row, truncate_row, write_bits


@triton.jit(do_not_specialize=["slots_ptr"])
def guess_cuts(
    logits_ptr,  # float [B, V]
    slots_ptr,  # int32 [B]
    logits_stride,
    temperature_ptr,  # float32 [R]
    cuts_ptr,  # float32 [B], written
    vocab_size,
    rank,  # of the cut among the sample, from above; at least SAMPLE for a cut below everything
    SAMPLE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """A row; grid (B,). The sample is runs of PIECE neighbours, evenly spread."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SAMPLE)
    ids = lanes // PIECE * (vocab_size // (SAMPLE // PIECE)) + lanes % PIECE
    temperature = tl.load(temperature_ptr + tl.load(slots_ptr + row))
    x = load_scaled(logits_ptr + row * logits_stride, ids, vocab_size, temperature)
    cut = find_theta(x, tl.where(x > float("-inf"), 1.0, 0.0), rank, BITS=16)
    tl.store(cuts_ptr + row, tl.where(rank < SAMPLE, cut, float("-inf")))


@triton.jit(do_not_specialize=["slots_ptr", "positions_ptr"])
def scan_chunks(
    logits_ptr,  # float [B, V]
    slots_ptr,  # int32 [B]
    positions_ptr,  # int64 [B]
    logits_stride,
    temperature_ptr,  # float32 [R]
    top_k_ptr,  # int32 [R]
    top_p_ptr,  # float32 [R]
    seeds_ptr,  # int64 [R]
    cuts_ptr,  # float32 [B]
    sums_ptr,  # float32 [B, S, 2], written: maximum and sum of exp(logit - maximum)
    marks_ptr,  # int32 [B, W], written for rows that truncate: a bit per id, lowest first, set for candidates
    bests_ptr,  # float32 [B, S], written for rows that do not truncate: the highest of logit + noise
    tokens_ptr,  # int32 [B, S], written for rows that do not truncate: its id
    num_placed_ptr,  # int32 [1], written: 0, for `draw_rows` to count in
    vocab_size,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one row; grid (B, S)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = row * tl.num_programs(1) + tl.program_id(1)
    if chunk == 0:
        tl.store(num_placed_ptr, 0)
    slot = tl.load(slots_ptr + row)
    temperature, top_k, top_p = _load_settings(slot, temperature_ptr, top_k_ptr, top_p_ptr)
    seed, position, cut = tl.load(seeds_ptr + slot), tl.load(positions_ptr + row), tl.load(cuts_ptr + row)
    truncates = (top_k < vocab_size) | (top_p < 1.0)
    maximum, totals = tl.full((), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    best, token = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.int32)
    for i in range(0, CHUNK, BLOCK):
        start = tl.program_id(1) * CHUNK + i
        ids = start + tl.arange(0, BLOCK)
        x = load_scaled(logits_ptr + row * logits_stride, ids, vocab_size, temperature)
        highest = tl.max(x)
        if highest > maximum:
            totals *= tl.exp(maximum - highest)
            maximum = highest
        if maximum > float("-inf"):
            totals += tl.exp(x - maximum)
        if truncates:
            marks = tl.reshape((x > cut).to(tl.int32), (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
            words = (chunk * CHUNK + i) // 32 + tl.arange(0, BLOCK // 32)
            tl.store(marks_ptr + words, tl.sum(marks, axis=1))
        elif _may_win(x, ids, best, seed, position, temperature):
            value, lane = draw_best(x, ids, ids < vocab_size, seed, position, temperature)
            token = tl.where(value > best, start + lane, token)
            best = tl.maximum(best, value)
    tl.store(sums_ptr + chunk * 2, maximum)
    tl.store(sums_ptr + chunk * 2 + 1, tl.sum(totals))
    if not truncates:
        tl.store(bests_ptr + chunk, best)
        tl.store(tokens_ptr + chunk, token)


@triton.jit(
    do_not_specialize=[
        *("slots_ptr", "positions_ptr", "num_sampled_ptr", "sampled_ptr", "packed_ptr", "bits_ptr"),
        *("starts_at", "logprobs_at", "slots_at", "routes_at", "ids_at", "room", "num_rows", "num_tokens"),
    ]
)
def draw_rows(
    logits_ptr,  # float [B, V]
    slots_ptr,  # int32 [B]
    positions_ptr,  # int64 [B]
    num_sampled_ptr,  # int32 [B]: 0 = nothing is sampled, nothing is recorded
    sampled_ptr,  # int64 [B], written
    packed_ptr,  # int32, written: the sizes of the supports, int32 [B], and the other parts, that begin at
    bits_ptr,  # uint8 [B, ceil(V / 8)], written where a size is negative: the kept set, lowest bit first
    logits_stride,
    starts_at,
    logprobs_at,
    slots_at,
    routes_at,
    ids_at,
    room,  # for ids
    num_rows,
    num_tokens,
    temperature_ptr,  # float32 [R]
    top_k_ptr,  # int32 [R]
    top_p_ptr,  # float32 [R]
    seeds_ptr,  # int64 [R]
    sums_ptr,  # float32 [B, S, 2]
    marks_ptr,  # int32 [B, W]
    bests_ptr,  # float32 [B, S]
    tokens_ptr,  # int32 [B, S]
    candidates_ptr,  # int32 [B, ROOM], written: the ids of the marks, ascending
    num_placed_ptr,  # int32 [1], 0; written: how many ids have asked for a place
    cache_slots_ptr,  # int64 [T], the tokens' cache slots
    routes_ptr,  # int32 [T, E]
    vocab_size,
    routes_per_token,
    CHUNKS: tl.constexpr,
    WORDS: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
    RECORD: tl.constexpr,
    ROUTE_BYTES: tl.constexpr,
):
    """A row, or a block of the routes; grid (B + ceil(T * E / BLOCK),). CHUNKS is S, WORDS is W."""
    row, start, size = tl.program_id(0).to(tl.int64), tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    if row < num_rows:
        slot, logits = tl.load(slots_ptr + row), logits_ptr + row * logits_stride
        temperature, top_k, top_p = _load_settings(slot, temperature_ptr, top_k_ptr, top_p_ptr)
        maximum, mass = _join_sums(sums_ptr + row * CHUNKS * 2, CHUNKS)
        if (top_k < vocab_size) | (top_p < 1.0):
            token, mass, start, size = _draw_kept(
                *(logits, marks_ptr + row * WORDS, candidates_ptr + row * ROOM, tl.load(seeds_ptr + slot)),
                *(tl.load(positions_ptr + row), maximum, mass, temperature, top_k, top_p, vocab_size),
                *(tl.load(num_sampled_ptr + row) > 0, num_placed_ptr, packed_ptr + ids_at, room),
                *(bits_ptr + row * tl.cdiv(vocab_size, 8), WORDS, ROOM, BLOCK, RECORD),
            )
        else:
            token = _join_bests(bests_ptr + row * CHUNKS, tokens_ptr + row * CHUNKS, CHUNKS)
        tl.store(sampled_ptr + row, token.to(tl.int64))
        logprob = load_scaled(logits, token, vocab_size, temperature) - maximum - tl.log(mass)
        store_row(packed_ptr + row, logprobs_at, starts_at, logprob, size, start, RECORD)
    elif ROUTE_BYTES > 0:
        copy_slots(cache_slots_ptr, packed_ptr + slots_at, row - num_rows, num_tokens, BLOCK)
        num_ids = num_tokens * routes_per_token
        copy_routes(routes_ptr, packed_ptr + routes_at, row - num_rows, num_ids, ROUTE_BYTES, BLOCK)


@triton.jit
def _draw_kept(
    logits_ptr,
    marks_ptr,
    candidates_ptr,
    seed,
    position,
    maximum,
    mass,  # of the whole row
    temperature,
    top_k,
    top_p,
    vocab_size,
    has_sampled,
    num_placed_ptr,
    ids_ptr,
    room,
    bits_ptr,
    WORDS: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
    RECORD: tl.constexpr,
):
    """The token drawn of a row's kept set, the set's sum of exp(x - maximum), with RECORD its start and size."""
    count, lanes = list_marks(marks_ptr, candidates_ptr, WORDS, ROOM), tl.arange(0, ROOM)
    ids = tl.load(candidates_ptr + lanes, mask=lanes < count, other=vocab_size)
    x = load_scaled(logits_ptr, ids, vocab_size, temperature)
    start = tl.zeros((), tl.int32)
    if (count <= ROOM) & _cover(x, maximum, mass, top_k, top_p, vocab_size):
        theta, last = truncate(x, ids, maximum, mass, top_k, top_p, vocab_size)
        kept = is_kept(x, ids, theta, last)
        mass = tl.sum(tl.where(kept, tl.exp(x - maximum), 0.0))
        size = tl.zeros((), tl.int32)
        _, lane = draw_best(tl.where(kept, x, float("-inf")), ids, kept, seed, position, temperature)
        token = tl.sum(tl.where(lanes == lane, ids, 0))
        if RECORD:
            start, size = place_ids(ids, kept, has_sampled, num_placed_ptr, ids_ptr, room)
    else:
        theta, last = truncate_row(logits_ptr, temperature, maximum, mass, top_k, top_p, vocab_size, BLOCK)
        token, mass, size = draw_from_row(
            logits_ptr, temperature, seed, position, maximum, theta, last, vocab_size, BLOCK
        )
    if RECORD:
        size = tl.where(has_sampled, size, 0)
        if size < 0:
            write_bits(logits_ptr, bits_ptr, temperature, theta, last, vocab_size, BLOCK)
    return token, mass, start, size


@triton.jit
def _load_settings(slot, temperature_ptr, top_k_ptr, top_p_ptr):
    """A request's temperature, top-k and top-p."""
    return tl.load(temperature_ptr + slot), tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot)


@triton.jit
def _may_win(x, ids, best, seed, position, temperature):
    """Whether any logit + noise may be above `best`; cheaper than the noise, and mostly not so.

    The noise of a uniform number u is -log(-log(1 - u)), at most -log(u): u has to be below exp(x - best). The factor
    is far more than rounding could make up.
    """
    low = murmur3_uniform32(seed, position, ids) < tl.exp(x - best) * 1.001
    return (temperature == 0.0) | (tl.max(low.to(tl.int32)) > 0)


@triton.jit
def _cover(x, maximum, mass, top_k, top_p, vocab_size):
    """Whether a row's kept set is among its candidates. `mass` is the whole row's sum of exp(x - maximum)."""
    count = tl.sum((x > float("-inf")).to(tl.int32))
    return tl.where(top_k < vocab_size, count >= top_k, tl.sum(tl.exp(x - maximum)) >= top_p * mass)


@triton.jit
def _join_sums(sums_ptr, CHUNKS: tl.constexpr):
    """A row's maximum, and its sum of exp(x - maximum)."""
    maximum = tl.full((), float("-inf"), tl.float32)
    for i in tl.static_range(CHUNKS):
        maximum = tl.maximum(maximum, tl.load(sums_ptr + i * 2))
    mass = tl.zeros((), tl.float32)
    for i in tl.static_range(CHUNKS):
        total = tl.load(sums_ptr + i * 2 + 1)
        mass += tl.where(total > 0, total * tl.exp(tl.load(sums_ptr + i * 2) - maximum), 0.0)
    return maximum, mass


@triton.jit
def _join_bests(bests_ptr, tokens_ptr, CHUNKS: tl.constexpr):
    """The best id of a row's chunks."""
    best, token = tl.load(bests_ptr), tl.load(tokens_ptr)
    for i in tl.static_range(1, CHUNKS):
        value = tl.load(bests_ptr + i)
        token = tl.where(value > best, tl.load(tokens_ptr + i), token)
        best = tl.maximum(best, value)
    return token
