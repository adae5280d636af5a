"""Truncation and the draw by walks over a whole row, in Triton: for the rows whose candidates are not all gathered.

One program walks a row some twenty times. Means the same as the functions of `order_kernels.py`, which see all of a row
at once; here a walk settles two bits of the order. Used by `draw_kernels.py`.
"""

# ruff: noqa: PLR0913  the parameters are the kernels' own
# pyright: reportMissingImports=false, reportInvalidTypeForm=false
# The kernel language is not typed for checkers.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl
from vllm.v1.worker.gpu.sample.gumbel import gumbel_noised_argmax

from rollout.vllm_plugin.order_kernels import count_ties, is_kept, load_scaled, value_of


@triton.jit
def truncate_row(logits_ptr, temperature, maximum, mass, top_k, top_p, vocab_size, BLOCK: tl.constexpr):
    """(theta, last) of a row's kept set. `mass` is the row's sum of exp(x - maximum)."""
    theta, last = tl.full((), float("-inf"), tl.float32), tl.full((), -1, tl.int32)
    if top_k < vocab_size:
        theta, last = _reach(logits_ptr, temperature, maximum, theta, last, top_k, vocab_size, BLOCK, COUNT=True)
        mass = _weigh(logits_ptr, temperature, maximum, theta, last, vocab_size, BLOCK)
    if top_p < 1.0:
        theta, last = _reach(
            logits_ptr, temperature, maximum, theta, last, top_p * mass, vocab_size, BLOCK, COUNT=False
        )
    return theta, last


@triton.jit
def draw_best(x, ids, there, seed, position, temperature):
    """The highest of logit + noise, and its lane. Logits that are not `there` have to be -inf."""
    return gumbel_noised_argmax(x, ids, there, seed, position, temperature, False, False, APPLY_TEMPERATURE=False)


@triton.jit
def draw_from_row(logits_ptr, temperature, seed, position, maximum, theta, last, vocab_size, BLOCK: tl.constexpr):
    """The token drawn of a row's kept set, the set's sum of exp(x - maximum), and its size, negative: not gathered."""
    best = tl.full((), float("-inf"), tl.float32)
    token, size = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    mass = tl.zeros((), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = load_scaled(logits_ptr, ids, vocab_size, temperature)
        kept = is_kept(x, ids, theta, last) & (ids < vocab_size)
        score = tl.where(kept, x, float("-inf"))
        value, lane = draw_best(score, ids, kept, seed, position, temperature)
        token = tl.where(value > best, start + lane, token)
        best = tl.maximum(best, value)
        mass += tl.sum(tl.where(kept, tl.exp(x - maximum), 0.0))
        size -= tl.sum(kept.to(tl.int32))
    return token, mass, size


@triton.jit
def write_bits(logits_ptr, bits_ptr, temperature, theta, last, vocab_size, BLOCK: tl.constexpr):
    """A bit per id of a row's vocabulary, lowest first: whether it is kept."""
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        kept = is_kept(load_scaled(logits_ptr, ids, vocab_size, temperature), ids, theta, last)
        bits = tl.sum(tl.reshape(kept.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :], axis=1)
        byte = start // 8 + tl.arange(0, BLOCK // 8)
        tl.store(bits_ptr + byte, bits.to(tl.uint8), mask=byte * 8 < vocab_size)


@triton.jit
def _load_weights(logits_ptr, ids, temperature, maximum, theta, last, vocab_size, COUNT: tl.constexpr):
    """A block of the row and what its ids weigh: nothing outside the set so far, else 1 or exp(x - maximum)."""
    x = load_scaled(logits_ptr, ids, vocab_size, temperature)
    weights = tl.where(x > float("-inf"), 1.0, 0.0) if COUNT else tl.exp(x - maximum)
    if theta > float("-inf"):
        weights = tl.where(is_kept(x, ids, theta, last), weights, 0.0)
    return x, weights


@triton.jit
def _weigh(logits_ptr, temperature, maximum, theta, last, vocab_size, BLOCK: tl.constexpr):
    """The sum of exp(x - maximum) over a set."""
    total = tl.zeros((), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        _, weights = _load_weights(logits_ptr, ids, temperature, maximum, theta, last, vocab_size, COUNT=False)
        total += tl.sum(weights)
    return total


@triton.jit
def _reach(logits_ptr, temperature, maximum, theta, last, target, vocab_size, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """(theta, last) of the smallest part of the set so far whose weight reaches `target`."""
    found = tl.zeros((), tl.uint32)
    step = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        low, middle, high = value_of(found + step), value_of(found + 2 * step), value_of(found + 3 * step)
        sums_low = tl.zeros((BLOCK,), tl.float32)
        sums_middle = tl.zeros((BLOCK,), tl.float32)
        sums_high = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x, weights = _load_weights(logits_ptr, ids, temperature, maximum, theta, last, vocab_size, COUNT=COUNT)
            sums_low += tl.where(x >= low, weights, 0.0)
            sums_middle += tl.where(x >= middle, weights, 0.0)
            sums_high += tl.where(x >= high, weights, 0.0)
        digit = (tl.sum(sums_low) >= target).to(tl.uint32) + (tl.sum(sums_middle) >= target).to(tl.uint32)
        found += (digit + (tl.sum(sums_high) >= target).to(tl.uint32)) * step
        step = step >> 2
    reached = value_of(found)
    above = tl.zeros((), tl.float32)
    weight = tl.zeros((), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x, weights = _load_weights(logits_ptr, ids, temperature, maximum, theta, last, vocab_size, COUNT=COUNT)
        above += tl.sum(tl.where(x > reached, weights, 0.0))
        weight = tl.maximum(weight, tl.max(tl.where(x == reached, weights, 0.0)))
    needed = count_ties(above, weight, target)
    final = tl.full((), -1, tl.int32)
    ties = tl.zeros((), tl.int32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x, weights = _load_weights(logits_ptr, ids, temperature, maximum, theta, last, vocab_size, COUNT=COUNT)
        tie = (x == reached) & (weights > 0)
        if tl.max(tie.to(tl.int32)) > 0:
            rank = ties + tl.cumsum(tie.to(tl.int32), axis=0)
            final = tl.maximum(final, tl.max(tl.where(tie & (rank <= needed), ids, -1)))
            ties += tl.sum(tie.to(tl.int32))
    return reached, final
