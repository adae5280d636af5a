"""Triton kernels of causal attention over packed sequences, with grouped queries, forward and backward.

The backward is two kernels, one for keys and values and one for queries, each summing in a fixed order where one kernel
with atomic additions would not: two runs give the same bits. A key's program walks all query heads of its group, so
nothing is repeated or summed over heads afterwards.

Layout: query, out [T, H, D]; key, value [T, G, D], GROUP = H / G; log-sum-exp and delta float32 [H, P], the former in
base 2. `CU` int32 [S + 1] are the sequences' boundaries. A sequence's log-sum-exps and deltas begin at a multiple of
PAD and go on to the next one, with infinity and zero: rows past its end have probabilities of zero. Grids are (blocks
of the longest sequence, heads, sequences): programs past the end of a shorter one return at once. Scores are scaled by
`scale`, and by log2(e) where they are exponents of 2.

What a loop reads comes by bulk copies through descriptors (`..._BLOCKS`) of [T, H * D] and [T, G * D]. Rows past
a sequence's end are then the next one's, or zeros: masks and probabilities of zero keep them out.
"""

# Triton comes with CUDA builds of torch only; its kernel language is not typed for checkers.
# pyright: reportMissingImports=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# ruff: noqa: PLR0913  the parameters are the kernels' own
from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _sequence(CU):
    """Where the program's sequence begins, and its length."""
    begin = tl.load(CU + tl.program_id(2))
    return begin, tl.load(CU + tl.program_id(2) + 1) - begin


@triton.jit
def _rows(PTR, begin, first, length, head, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses of BLOCK rows of one head from the sequence's row `first` on, [BLOCK, WIDTH]; which of them exist."""
    row = first + tl.arange(0, BLOCK)[:, None]
    at = (begin.to(tl.int64) * NUM_HEADS + row * NUM_HEADS + head) * WIDTH + tl.arange(0, WIDTH)[None, :]
    return PTR + at, row < length


@triton.jit
def _load_rows(PTR, begin, first, length, head, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK rows of one head from the sequence's row `first` on, [BLOCK, WIDTH]; zeros past its end."""
    at, inside = _rows(PTR, begin, first, length, head, NUM_HEADS, WIDTH, BLOCK)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store_rows(
    PTR, values, begin, first, length, head, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    at, inside = _rows(PTR, begin, first, length, head, NUM_HEADS, WIDTH, BLOCK)
    tl.store(at, values.to(PTR.dtype.element_ty), mask=inside)


@triton.jit
def _statistics(begin, head, stride, PAD: tl.constexpr):
    """Where the log-sum-exps and deltas of the program's sequence begin for one head."""
    return head * stride + (begin // PAD + tl.program_id(2)) * PAD


@triton.jit
def _attend(
    query,
    highest,
    total,
    out,
    KEY_BLOCKS,
    VALUE_BLOCKS,
    start,
    stop,
    first,
    begin,
    key_head,
    scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Takes keys `start` to `stop` into the running softmax of queries from row `first` on."""
    for column in range(start, stop, COLUMNS):
        key = KEY_BLOCKS.load([begin + column, key_head * D])
        scores = tl.dot(query, tl.trans(key)) * (scale * LOG2_E)
        if MASKED:
            after = (column + tl.arange(0, COLUMNS))[None, :] > (first + tl.arange(0, ROWS))[:, None]
            scores = tl.where(after, -float("inf"), scores)
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - new_highest)
        probs = tl.exp2(scores - new_highest[:, None])
        total = total * shrink + tl.sum(probs, 1)
        value = VALUE_BLOCKS.load([begin + column, key_head * D])
        out = tl.dot(probs.to(value.dtype), value, out * shrink[:, None])
        highest = new_highest
    return highest, total, out


@triton.jit
def forward_kernel(
    QUERY,
    KEY_BLOCKS,
    VALUE_BLOCKS,
    OUT,
    LSE,
    CU,
    scale,
    stride,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of queries of one head; the last block of a sequence, which has the most keys, comes first."""
    head = tl.program_id(1)
    begin, length = _sequence(CU)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    if first >= length:
        return
    query = _load_rows(QUERY, begin, first, length, head, H, D, ROWS)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)
    highest, total, out = _attend(
        query, highest, total, out, KEY_BLOCKS, VALUE_BLOCKS,
        0, first, first, begin, head // GROUP, scale, D, ROWS, COLUMNS, False,
    )  # fmt: skip
    highest, total, out = _attend(
        query, highest, total, out, KEY_BLOCKS, VALUE_BLOCKS,
        first, tl.minimum(first + ROWS, length), first, begin, head // GROUP, scale, D, ROWS, COLUMNS, True,
    )  # fmt: skip
    _store_rows(OUT, out / total[:, None], begin, first, length, head, H, D, ROWS)
    row = first + tl.arange(0, ROWS)
    lse = tl.where(row < length, highest + tl.log2(total), float("inf"))
    tl.store(LSE + _statistics(begin, head, stride, PAD) + row, lse)


@triton.jit
def delta_kernel(OUT, GRAD, DELTA, CU, stride, H: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr):
    """delta = sum of out * grad over the head's width, zero past a sequence's end: PAD rows of one head."""
    head = tl.program_id(1)
    begin, length = _sequence(CU)
    first = tl.program_id(0) * PAD
    if first >= length:
        return
    out = _load_rows(OUT, begin, first, length, head, H, D, PAD).to(tl.float32)
    grad = _load_rows(GRAD, begin, first, length, head, H, D, PAD).to(tl.float32)
    row = first + tl.arange(0, PAD)
    tl.store(DELTA + _statistics(begin, head, stride, PAD) + row, tl.sum(out * grad, 1))


@triton.jit
def key_value_grad_kernel(
    QUERY_BLOCKS,
    KEY,
    VALUE,
    GRAD_BLOCKS,
    LSE,
    DELTA,
    KEY_GRAD,
    VALUE_GRAD,
    CU,
    scale,
    stride,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of keys and values of one key head: all later queries of all heads of the group, in order."""
    key_head = tl.program_id(1)
    begin, length = _sequence(CU)
    column = tl.program_id(0) * COLUMNS
    if column >= length:
        return
    G: tl.constexpr = H // GROUP
    key = _load_rows(KEY, begin, column, length, key_head, G, D, COLUMNS)
    value = _load_rows(VALUE, begin, column, length, key_head, G, D, COLUMNS)
    key_grad = tl.zeros([COLUMNS, D], tl.float32)
    value_grad = tl.zeros([COLUMNS, D], tl.float32)
    head, first = key_head * GROUP, column
    for _ in range(GROUP * tl.cdiv(length - column, ROWS)):  # one loop keeps loads in flight across heads
        query = QUERY_BLOCKS.load([begin + first, head * D])
        grad = GRAD_BLOCKS.load([begin + first, head * D])
        at = _statistics(begin, head, stride, PAD) + first + tl.arange(0, ROWS)
        lse = tl.load(LSE + at)
        delta = tl.load(DELTA + at)
        probs = tl.exp2(tl.dot(key, tl.trans(query)) * (scale * LOG2_E) - lse[None, :])
        if first < column + COLUMNS:  # masks are slow, and most blocks need none
            after = (column + tl.arange(0, COLUMNS))[:, None] > (first + tl.arange(0, ROWS))[None, :]
            probs = tl.where(after, 0.0, probs)
        value_grad = tl.dot(probs.to(grad.dtype), grad, value_grad)
        scores_grad = probs * (tl.dot(value, tl.trans(grad)) - delta[None, :])
        key_grad = tl.dot(scores_grad.to(query.dtype), query, key_grad)
        is_last = first + ROWS >= length  # of the head's blocks
        head = tl.where(is_last, head + 1, head)
        first = tl.where(is_last, column, first + ROWS)
    _store_rows(KEY_GRAD, key_grad * scale, begin, column, length, key_head, G, D, COLUMNS)
    _store_rows(VALUE_GRAD, value_grad, begin, column, length, key_head, G, D, COLUMNS)


@triton.jit
def _query_step(
    query,
    grad,
    lse,
    delta,
    query_grad,
    KEY_BLOCKS,
    VALUE_BLOCKS,
    start,
    stop,
    first,
    begin,
    key_head,
    scale,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what keys `start` to `stop` give to a block of queries."""
    for column in range(start, stop, COLUMNS):
        key = KEY_BLOCKS.load([begin + column, key_head * D])
        probs = tl.exp2(tl.dot(query, tl.trans(key)) * (scale * LOG2_E) - lse[:, None])
        if MASKED:
            after = (column + tl.arange(0, COLUMNS))[None, :] > (first + tl.arange(0, ROWS))[:, None]
            probs = tl.where(after, 0.0, probs)
        value = VALUE_BLOCKS.load([begin + column, key_head * D])
        scores_grad = probs * (tl.dot(grad, tl.trans(value)) - delta[:, None])
        query_grad = tl.dot(scores_grad.to(key.dtype), key, query_grad)
    return query_grad


@triton.jit
def query_grad_kernel(
    QUERY,
    KEY_BLOCKS,
    VALUE_BLOCKS,
    GRAD,
    LSE,
    DELTA,
    QUERY_GRAD,
    CU,
    scale,
    stride,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of queries of one head."""
    head = tl.program_id(1)
    begin, length = _sequence(CU)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    if first >= length:
        return
    query = _load_rows(QUERY, begin, first, length, head, H, D, ROWS)
    grad = _load_rows(GRAD, begin, first, length, head, H, D, ROWS)
    row = first + tl.arange(0, ROWS)
    at = _statistics(begin, head, stride, PAD) + row
    lse = tl.load(LSE + at, mask=row < length, other=float("inf"))
    delta = tl.load(DELTA + at, mask=row < length, other=0.0)
    query_grad = tl.zeros([ROWS, D], tl.float32)
    query_grad = _query_step(
        query, grad, lse, delta, query_grad, KEY_BLOCKS, VALUE_BLOCKS,
        0, first, first, begin, head // GROUP, scale, D, ROWS, COLUMNS, False,
    )  # fmt: skip
    query_grad = _query_step(
        query, grad, lse, delta, query_grad, KEY_BLOCKS, VALUE_BLOCKS,
        first, tl.minimum(first + ROWS, length), first, begin, head // GROUP, scale, D, ROWS, COLUMNS, True,
    )  # fmt: skip
    _store_rows(QUERY_GRAD, query_grad * scale, begin, first, length, head, H, D, ROWS)
