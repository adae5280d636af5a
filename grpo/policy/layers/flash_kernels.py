"""Triton kernels of causal attention over packed sequences, with grouped queries, forward and backward.

The backward is two kernels, one for keys and values and one for queries, each summing in a fixed order where one kernel
with atomic additions would not: two runs give the same bits. A key's program walks all query heads of its group, so
nothing is repeated or summed over heads afterwards.

A sequence may go on from a parent, all of whose keys it sees before its own. What a parent's keys get from its children
is summed run by run first: a single program would be the last to end by far. Without a single parent (`TREE` is None)
nothing of this is compiled.

Layout: query, out [T, H, D]; key, value [T, G, D], GROUP = H / G; log-sum-exp and delta float32 [H, P], the former in
base 2. `CU` int32 [S + 1] are the sequences' boundaries. A sequence's log-sum-exps and deltas begin at a multiple of
PAD and go on to the next one, with infinity and zero: rows past its end have probabilities of zero. Grids are (blocks
of the longest sequence, heads, sequences): programs past the end of a shorter one return at once. Scores are scaled by
`scale`, and by log2(e) where they are exponents of 2.

`TREE` int32 [S, 6] has of each sequence: where its parent begins, and the parent's length (0 = none); if it leads a run
of children, the run's last sequence + 1 (else 0), and the run's first row in `KEY_PARTS` and `VALUE_PARTS`, which are
float32 [T, G, D]; the first such row of all runs of its own children, and their number.

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

from grpo.policy.layers.flash_rows import (
    ALL,
    CAUSAL,
    LOG2_E,
    UP_TO_STOP,
    hidden,
    load_rows,
    pair,
    sequence,
    statistics,
    store_rows,
)


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
    SEEN: tl.constexpr,
):
    """Takes keys `start` to `stop` of the sequence at `begin` into the running softmax of queries from `first` on."""
    for column in range(start, stop, COLUMNS):
        key = KEY_BLOCKS.load([begin + column, key_head * D])
        scores = tl.dot(query, tl.trans(key)) * (scale * LOG2_E)
        if SEEN != ALL:
            scores = tl.where(hidden(column, first, stop, ROWS, COLUMNS, SEEN), -float("inf"), scores)
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
    TREE,
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
    begin, length = sequence(CU, tl.program_id(2))
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    if first >= length:
        return
    query = load_rows(QUERY, begin, first, length, head, H, D, ROWS)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)
    if TREE is not None:
        before, num_before = pair(TREE, 0)
        whole = num_before // COLUMNS * COLUMNS
        highest, total, out = _attend(
            query, highest, total, out, KEY_BLOCKS, VALUE_BLOCKS,
            0, whole, first, before, head // GROUP, scale, D, ROWS, COLUMNS, ALL,
        )  # fmt: skip
        highest, total, out = _attend(
            query, highest, total, out, KEY_BLOCKS, VALUE_BLOCKS,
            whole, num_before, first, before, head // GROUP, scale, D, ROWS, COLUMNS, UP_TO_STOP,
        )  # fmt: skip
    highest, total, out = _attend(
        query, highest, total, out, KEY_BLOCKS, VALUE_BLOCKS,
        0, first, first, begin, head // GROUP, scale, D, ROWS, COLUMNS, ALL,
    )  # fmt: skip
    highest, total, out = _attend(
        query, highest, total, out, KEY_BLOCKS, VALUE_BLOCKS,
        first, tl.minimum(first + ROWS, length), first, begin, head // GROUP, scale, D, ROWS, COLUMNS, CAUSAL,
    )  # fmt: skip
    store_rows(OUT, out / total[:, None], begin, first, length, head, H, D, ROWS)
    row = first + tl.arange(0, ROWS)
    lse = tl.where(row < length, highest + tl.log2(total), float("inf"))
    tl.store(LSE + statistics(begin, tl.program_id(2), head, stride, PAD) + row, lse)


@triton.jit
def delta_kernel(OUT, GRAD, DELTA, CU, stride, H: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr):
    """delta = sum of out * grad over the head's width, zero past a sequence's end: PAD rows of one head."""
    head = tl.program_id(1)
    begin, length = sequence(CU, tl.program_id(2))
    first = tl.program_id(0) * PAD
    if first >= length:
        return
    out = load_rows(OUT, begin, first, length, head, H, D, PAD).to(tl.float32)
    grad = load_rows(GRAD, begin, first, length, head, H, D, PAD).to(tl.float32)
    row = first + tl.arange(0, PAD)
    tl.store(DELTA + statistics(begin, tl.program_id(2), head, stride, PAD) + row, tl.sum(out * grad, 1))


@triton.jit
def _key_value_steps(
    key,
    value,
    key_grad,
    value_grad,
    QUERY_BLOCKS,
    GRAD_BLOCKS,
    LSE,
    DELTA,
    begin,
    length,
    number,
    start,
    column,
    key_head,
    scale,
    stride,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEEN: tl.constexpr,
):
    """Adds what queries from `start` on, of a sequence and all heads of a group, give to a block of keys."""
    head, first = key_head * GROUP, start
    for _ in range(GROUP * tl.cdiv(length - start, ROWS)):  # one loop keeps loads in flight across heads
        query = QUERY_BLOCKS.load([begin + first, head * D])
        grad = GRAD_BLOCKS.load([begin + first, head * D])
        at = statistics(begin, number, head, stride, PAD) + first + tl.arange(0, ROWS)
        lse = tl.load(LSE + at)
        delta = tl.load(DELTA + at)
        probs = tl.exp2(tl.dot(key, tl.trans(query)) * (scale * LOG2_E) - lse[None, :])
        if SEEN == CAUSAL:  # noqa: SIM102  decided while compiling, the next one is not
            if first < column + COLUMNS:  # masks are slow, and most blocks need none
                after = (column + tl.arange(0, COLUMNS))[:, None] > (first + tl.arange(0, ROWS))[None, :]
                probs = tl.where(after, 0.0, probs)
        value_grad = tl.dot(probs.to(grad.dtype), grad, value_grad)
        scores_grad = probs * (tl.dot(value, tl.trans(grad)) - delta[None, :])
        key_grad = tl.dot(scores_grad.to(query.dtype), query, key_grad)
        is_last = first + ROWS >= length  # of the head's blocks
        head = tl.where(is_last, head + 1, head)
        first = tl.where(is_last, start, first + ROWS)
    return key_grad, value_grad


@triton.jit
def run_grad_kernel(
    QUERY_BLOCKS,
    KEY,
    VALUE,
    GRAD_BLOCKS,
    LSE,
    DELTA,
    KEY_PARTS,
    VALUE_PARTS,
    CU,
    TREE,
    scale,
    stride,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of a parent's keys and values of one key head: all queries of a run of its children."""
    key_head = tl.program_id(1)
    before, num_before = pair(TREE, 0)
    stop, part = pair(TREE, 2)
    column = tl.program_id(0) * COLUMNS
    if column >= tl.where(stop > 0, num_before, 0):
        return
    G: tl.constexpr = H // GROUP
    key = load_rows(KEY, before, column, num_before, key_head, G, D, COLUMNS)
    value = load_rows(VALUE, before, column, num_before, key_head, G, D, COLUMNS)
    key_grad = tl.zeros([COLUMNS, D], tl.float32)
    value_grad = tl.zeros([COLUMNS, D], tl.float32)
    for number in range(tl.program_id(2), stop):
        begin, length = sequence(CU, number)
        key_grad, value_grad = _key_value_steps(
            key, value, key_grad, value_grad, QUERY_BLOCKS, GRAD_BLOCKS, LSE, DELTA,
            begin, length, number, 0, column, key_head, scale, stride, GROUP, D, PAD, ROWS, COLUMNS, ALL,
        )  # fmt: skip
    store_rows(KEY_PARTS, key_grad, part, column, num_before, key_head, G, D, COLUMNS)
    store_rows(VALUE_PARTS, value_grad, part, column, num_before, key_head, G, D, COLUMNS)


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
    KEY_PARTS,
    VALUE_PARTS,
    CU,
    TREE,
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
    begin, length = sequence(CU, tl.program_id(2))
    column = tl.program_id(0) * COLUMNS
    if column >= length:
        return
    G: tl.constexpr = H // GROUP
    key = load_rows(KEY, begin, column, length, key_head, G, D, COLUMNS)
    value = load_rows(VALUE, begin, column, length, key_head, G, D, COLUMNS)
    key_grad = tl.zeros([COLUMNS, D], tl.float32)
    value_grad = tl.zeros([COLUMNS, D], tl.float32)
    key_grad, value_grad = _key_value_steps(
        key, value, key_grad, value_grad, QUERY_BLOCKS, GRAD_BLOCKS, LSE, DELTA,
        begin, length, tl.program_id(2), column, column, key_head, scale, stride,
        GROUP, D, PAD, ROWS, COLUMNS, CAUSAL,
    )  # fmt: skip
    if TREE is not None:
        part, num_parts = pair(TREE, 4)
        for _ in range(num_parts):
            key_grad += load_rows(KEY_PARTS, part, column, length, key_head, G, D, COLUMNS)
            value_grad += load_rows(VALUE_PARTS, part, column, length, key_head, G, D, COLUMNS)
            part += length
    store_rows(KEY_GRAD, key_grad * scale, begin, column, length, key_head, G, D, COLUMNS)
    store_rows(VALUE_GRAD, value_grad, begin, column, length, key_head, G, D, COLUMNS)


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
    SEEN: tl.constexpr,
):
    """Adds what keys `start` to `stop` of the sequence at `begin` give to a block of queries."""
    for column in range(start, stop, COLUMNS):
        key = KEY_BLOCKS.load([begin + column, key_head * D])
        probs = tl.exp2(tl.dot(query, tl.trans(key)) * (scale * LOG2_E) - lse[:, None])
        if SEEN != ALL:
            probs = tl.where(hidden(column, first, stop, ROWS, COLUMNS, SEEN), 0.0, probs)
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
    TREE,
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
    begin, length = sequence(CU, tl.program_id(2))
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    if first >= length:
        return
    query = load_rows(QUERY, begin, first, length, head, H, D, ROWS)
    grad = load_rows(GRAD, begin, first, length, head, H, D, ROWS)
    row = first + tl.arange(0, ROWS)
    at = statistics(begin, tl.program_id(2), head, stride, PAD) + row
    lse = tl.load(LSE + at, mask=row < length, other=float("inf"))
    delta = tl.load(DELTA + at, mask=row < length, other=0.0)
    query_grad = tl.zeros([ROWS, D], tl.float32)
    if TREE is not None:
        before, num_before = pair(TREE, 0)
        whole = num_before // COLUMNS * COLUMNS
        query_grad = _query_step(
            query, grad, lse, delta, query_grad, KEY_BLOCKS, VALUE_BLOCKS,
            0, whole, first, before, head // GROUP, scale, D, ROWS, COLUMNS, ALL,
        )  # fmt: skip
        query_grad = _query_step(
            query, grad, lse, delta, query_grad, KEY_BLOCKS, VALUE_BLOCKS,
            whole, num_before, first, before, head // GROUP, scale, D, ROWS, COLUMNS, UP_TO_STOP,
        )  # fmt: skip
    query_grad = _query_step(
        query, grad, lse, delta, query_grad, KEY_BLOCKS, VALUE_BLOCKS,
        0, first, first, begin, head // GROUP, scale, D, ROWS, COLUMNS, ALL,
    )  # fmt: skip
    query_grad = _query_step(
        query, grad, lse, delta, query_grad, KEY_BLOCKS, VALUE_BLOCKS,
        first, tl.minimum(first + ROWS, length), first, begin, head // GROUP, scale, D, ROWS, COLUMNS, CAUSAL,
    )  # fmt: skip
    store_rows(QUERY_GRAD, query_grad * scale, begin, first, length, head, H, D, ROWS)
