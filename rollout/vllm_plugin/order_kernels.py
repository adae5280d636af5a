"""The order that truncation goes by, in Triton: the smallest set of likeliest ids that reaches a weight.

Such a set is told by two numbers: an id is in it if its logit is above `theta`, or equals it and the id is at most
`last`. So of equally likely ids the lowest go in first, as in vLLM's kernels. `theta` is found bit by bit, from the
highest, in integers that have the order of the floats: 32 sums, no bound on how close two logits may lie.

Used by `draw_kernels.py` and `wide_kernels.py`.
"""

# pyright: reportMissingImports=false, reportInvalidTypeForm=false
# The kernel language is not typed for checkers.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_scaled(logits_ptr, ids, vocab_size, temperature):
    """Logits divided by the temperature, float32; at temperature 0 as they are. -inf beyond the vocabulary."""
    x = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    if (temperature != 0.0) & (temperature != 1.0):
        x = x / temperature
    return x


@triton.jit
def is_kept(x, ids, theta, last):
    """Whether an id is in the set that `theta` and `last` tell."""
    return (x > theta) | ((x == theta) & (ids <= last))


@triton.jit
def order_of(x):
    """Unsigned integers in the order of the floats `x`."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, ~bits, bits | 0x80000000)


@triton.jit
def value_of(order):
    """The float of a place in the order; -inf below the place of -inf."""
    bits = tl.where((order >> 31) == 1, order ^ 0x80000000, ~order)
    return tl.where(order < 0x00800000, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def find_theta(x, weights, target, BITS: tl.constexpr = 32):
    """The highest of `x` such that what is at least as high weighs at least `target`; -inf if all of it does not.

    With fewer BITS, a number a little below.
    """
    order = order_of(x)
    found = tl.zeros((), tl.uint32)
    step = tl.full((), 0x80000000, tl.uint32)
    for _ in range(BITS):
        trial = found | step
        found = tl.where(tl.sum(tl.where(order >= trial, weights, 0.0)) >= target, trial, found)
        step = step >> 1
    return value_of(found)


@triton.jit
def count_ties(above, weight, target):
    """How many ids of one `weight` each are needed beside a weight of `above` to reach `target`: at least one."""
    return tl.maximum(tl.ceil((target - above) / weight), 1.0)


@triton.jit
def find_last(x, ids, weights, theta, target):
    """The last id at `theta` that is needed to reach `target`; -1 if there is none at `theta`."""
    ties = (x == theta) & (weights > 0)
    above = tl.sum(tl.where(x > theta, weights, 0.0))
    needed = count_ties(above, tl.max(tl.where(ties, weights, 0.0)), target)
    last = tl.max(tl.where(ties, ids, -1))
    if tl.sum(ties.to(tl.int32)) > needed:
        last = tl.max(tl.where(ties & (tl.cumsum(ties.to(tl.int32), axis=0) <= needed), ids, -1))
    return last


@triton.jit
def truncate(x, ids, maximum, mass, top_k, top_p, vocab_size):
    """(theta, last) of a row's kept set. `x` holds all its ids; `mass` is the whole row's sum of exp(x - maximum)."""
    theta, last = tl.full((), float("-inf"), tl.float32), tl.full((), -1, tl.int32)
    if top_k < vocab_size:
        ones = tl.where(x > float("-inf"), 1.0, 0.0)
        theta = find_theta(x, ones, top_k)
        last = find_last(x, ids, ones, theta, top_k)
    if top_p < 1.0:
        weights = tl.where(is_kept(x, ids, theta, last), tl.exp(x - maximum), 0.0)
        target = top_p * tl.where(top_k < vocab_size, tl.sum(weights), mass)
        theta = find_theta(x, weights, target)
        last = find_last(x, ids, weights, theta, target)
    return theta, last


@triton.jit
def list_marks(marks_ptr, ids_ptr, NUM_WORDS: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr = 2048):
    """Writes the ids whose bits are set in int32 words, ascending, as far as there is room. How many there are.

    All threads of the program may read them afterwards.
    """
    count = tl.zeros((), tl.int32)
    for start in range(0, NUM_WORDS, TILE):
        lanes = start + tl.arange(0, TILE)
        words = tl.load(marks_ptr + lanes, mask=lanes < NUM_WORDS, other=0).to(tl.uint32, bitcast=True)
        sizes = _count_bits(words)
        place = count + tl.cumsum(sizes, axis=0) - sizes
        while tl.max((words != 0).to(tl.int32)) > 0:
            lowest = words & (~words + 1)
            bit = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
            tl.store(ids_ptr + place, lanes * 32 + bit, mask=(words != 0) & (place < ROOM))
            place += 1
            words ^= lowest
        count += tl.sum(sizes)
    tl.debug_barrier()
    return count


@triton.jit
def _count_bits(words):
    """Bits that are set in uint32 words, int32."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)
