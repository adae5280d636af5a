"""Triton kernels of causal attention over packed sequences, with grouped queries, forward and backward.

The backward is two kernels, one for keys and values and one for queries, each summing in a fixed order where one kernel
with atomic additions would not: two runs give the same bits. A key's program walks all query heads of its group, so
nothing is repeated or summed over heads afterwards.

Layout: query, out [T, H, D]; key, value [T, G, D], GROUP = H / G; log-sum-exp and delta float32 [H, T], the former in
base 2. `CU` int32 [S + 1] are the sequences' boundaries. Grids are (blocks of the longest sequence, heads, sequences):
programs past the end of a shorter one return at once. Scores are scaled by `scale`, and by log2(e) where they are
exponents of 2.
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
def _rows(PTR, first, length, head, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK rows of one head from row `first` on, [BLOCK, WIDTH]; zeros from row `length` on."""
    row = first + tl.arange(0, BLOCK)[:, None]
    at = PTR + (row * NUM_HEADS + head) * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(at, mask=row < length, other=0.0)


@triton.jit
def _store_rows(PTR, values, first, length, head, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = first + tl.arange(0, BLOCK)[:, None]
    at = PTR + (row * NUM_HEADS + head) * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(at, values.to(PTR.dtype.element_ty), mask=row < length)


@triton.jit
def _attend(
    query,
    highest,
    total,
    out,
    KEY,
    VALUE,
    start,
    stop,
    first,
    length,
    key_head,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Takes keys `start` to `stop` into the running softmax of queries from row `first` on."""
    for column in range(start, stop, COLUMNS):
        key = _rows(KEY, column, length, key_head, G, D, COLUMNS)
        scores = tl.dot(query, tl.trans(key)) * (scale * LOG2_E)
        if MASKED:
            after = (column + tl.arange(0, COLUMNS))[None, :] > (first + tl.arange(0, ROWS))[:, None]
            scores = tl.where(after, -float("inf"), scores)
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - new_highest)
        probs = tl.exp2(scores - new_highest[:, None])
        total = total * shrink + tl.sum(probs, 1)
        value = _rows(VALUE, column, length, key_head, G, D, COLUMNS)
        out = tl.dot(probs.to(value.dtype), value, out * shrink[:, None])
        highest = new_highest
    return highest, total, out


@triton.jit
def forward_kernel(
    QUERY,
    KEY,
    VALUE,
    OUT,
    LSE,
    CU,
    scale,
    num_tokens,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of queries of one head; the last block of a sequence, which has the most keys, comes first."""
    head = tl.program_id(1)
    begin = tl.load(CU + tl.program_id(2)).to(tl.int64)
    length = tl.load(CU + tl.program_id(2) + 1) - begin.to(tl.int32)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    if first >= length:
        return
    G: tl.constexpr = H // GROUP
    KEY += begin * G * D
    VALUE += begin * G * D
    query = _rows(QUERY + begin * H * D, first, length, head, H, D, ROWS)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)
    highest, total, out = _attend(
        query, highest, total, out, KEY, VALUE,
        0, first, first, length, head // GROUP, scale, G, D, ROWS, COLUMNS, False,
    )  # fmt: skip
    highest, total, out = _attend(
        query, highest, total, out, KEY, VALUE,
        first, tl.minimum(first + ROWS, length), first, length, head // GROUP, scale, G, D, ROWS, COLUMNS, True,
    )  # fmt: skip
    _store_rows(OUT + begin * H * D, out / total[:, None], first, length, head, H, D, ROWS)
    row = first + tl.arange(0, ROWS)
    tl.store(LSE + head.to(tl.int64) * num_tokens + begin + row, highest + tl.log2(total), mask=row < length)


@triton.jit
def delta_kernel(OUT, GRAD, DELTA, num_tokens, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """delta = sum of out * grad over the head's width: grid (blocks of tokens, heads)."""
    head = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * ROWS
    out = _rows(OUT, first, num_tokens, head, H, D, ROWS).to(tl.float32)
    grad = _rows(GRAD, first, num_tokens, head, H, D, ROWS).to(tl.float32)
    row = first + tl.arange(0, ROWS)
    tl.store(DELTA + head.to(tl.int64) * num_tokens + row, tl.sum(out * grad, 1), mask=row < num_tokens)


@triton.jit
def key_value_grad_kernel(
    QUERY,
    KEY,
    VALUE,
    GRAD,
    LSE,
    DELTA,
    KEY_GRAD,
    VALUE_GRAD,
    CU,
    scale,
    num_tokens,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of keys and values of one key head: all later queries of all heads of the group, in order."""
    key_head = tl.program_id(1)
    begin = tl.load(CU + tl.program_id(2)).to(tl.int64)
    length = tl.load(CU + tl.program_id(2) + 1) - begin.to(tl.int32)
    column = tl.program_id(0) * COLUMNS
    if column >= length:
        return
    G: tl.constexpr = H // GROUP
    QUERY += begin * H * D
    GRAD += begin * H * D
    key = _rows(KEY + begin * G * D, column, length, key_head, G, D, COLUMNS)
    value = _rows(VALUE + begin * G * D, column, length, key_head, G, D, COLUMNS)
    key_grad = tl.zeros([COLUMNS, D], tl.float32)
    value_grad = tl.zeros([COLUMNS, D], tl.float32)
    blocks = tl.cdiv(length - column, ROWS)
    for step in range(GROUP * blocks):  # one loop over heads and rows keeps loads in flight across heads
        head = key_head * GROUP + step // blocks
        first = column + (step % blocks) * ROWS
        row = first + tl.arange(0, ROWS)
        of_head = head.to(tl.int64) * num_tokens + begin
        query = _rows(QUERY, first, length, head, H, D, ROWS)
        grad = _rows(GRAD, first, length, head, H, D, ROWS)
        lse = tl.load(LSE + of_head + row, mask=row < length, other=float("inf"))
        delta = tl.load(DELTA + of_head + row, mask=row < length, other=0.0)
        probs = tl.exp2(tl.dot(key, tl.trans(query)) * (scale * LOG2_E) - lse[None, :])
        after = (column + tl.arange(0, COLUMNS))[:, None] > row[None, :]
        probs = tl.where(after, 0.0, probs)
        value_grad = tl.dot(probs.to(grad.dtype), grad, value_grad)
        scores_grad = probs * (tl.dot(value, tl.trans(grad)) - delta[None, :])
        key_grad = tl.dot(scores_grad.to(query.dtype), query, key_grad)
    _store_rows(KEY_GRAD + begin * G * D, key_grad * scale, column, length, key_head, G, D, COLUMNS)
    _store_rows(VALUE_GRAD + begin * G * D, value_grad, column, length, key_head, G, D, COLUMNS)


@triton.jit
def _query_step(
    query,
    grad,
    lse,
    delta,
    query_grad,
    KEY,
    VALUE,
    start,
    stop,
    first,
    length,
    key_head,
    scale,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds what keys `start` to `stop` give to a block of queries."""
    for column in range(start, stop, COLUMNS):
        key = _rows(KEY, column, length, key_head, G, D, COLUMNS)
        probs = tl.exp2(tl.dot(query, tl.trans(key)) * (scale * LOG2_E) - lse[:, None])
        if MASKED:
            after = (column + tl.arange(0, COLUMNS))[None, :] > (first + tl.arange(0, ROWS))[:, None]
            probs = tl.where(after, 0.0, probs)
        value = _rows(VALUE, column, length, key_head, G, D, COLUMNS)
        scores_grad = probs * (tl.dot(grad, tl.trans(value)) - delta[:, None])
        query_grad = tl.dot(scores_grad.to(key.dtype), key, query_grad)
    return query_grad


@triton.jit
def query_grad_kernel(
    QUERY,
    KEY,
    VALUE,
    GRAD,
    LSE,
    DELTA,
    QUERY_GRAD,
    CU,
    scale,
    num_tokens,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A block of queries of one head."""
    head = tl.program_id(1)
    begin = tl.load(CU + tl.program_id(2)).to(tl.int64)
    length = tl.load(CU + tl.program_id(2) + 1) - begin.to(tl.int32)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    if first >= length:
        return
    G: tl.constexpr = H // GROUP
    KEY += begin * G * D
    VALUE += begin * G * D
    query = _rows(QUERY + begin * H * D, first, length, head, H, D, ROWS)
    grad = _rows(GRAD + begin * H * D, first, length, head, H, D, ROWS)
    row = first + tl.arange(0, ROWS)
    of_head = head.to(tl.int64) * num_tokens + begin
    lse = tl.load(LSE + of_head + row, mask=row < length, other=float("inf"))
    delta = tl.load(DELTA + of_head + row, mask=row < length, other=0.0)
    query_grad = tl.zeros([ROWS, D], tl.float32)
    query_grad = _query_step(
        query, grad, lse, delta, query_grad, KEY, VALUE,
        0, first, first, length, head // GROUP, scale, G, D, ROWS, COLUMNS, False,
    )  # fmt: skip
    query_grad = _query_step(
        query, grad, lse, delta, query_grad, KEY, VALUE,
        first, tl.minimum(first + ROWS, length), first, length, head // GROUP, scale, G, D, ROWS, COLUMNS, True,
    )  # fmt: skip
    _store_rows(QUERY_GRAD + begin * H * D, query_grad * scale, first, length, head, H, D, ROWS)
