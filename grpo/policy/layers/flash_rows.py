"""What the kernels of `flash_kernels` have in common: where a sequence's rows are, and which keys are hidden."""

# Triton comes with CUDA builds of torch only; its kernel language is not typed for checkers.
# pyright: reportMissingImports=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# ruff: noqa: PLR0913  the parameters are the kernels' own
from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
ALL: tl.constexpr = tl.constexpr(0)
CAUSAL: tl.constexpr = tl.constexpr(1)
UP_TO_STOP: tl.constexpr = tl.constexpr(2)
"""What a block of queries sees of a block of keys."""


@triton.jit
def sequence(CU, number):
    """Where a sequence begins, and its length."""
    begin = tl.load(CU + number)
    return begin, tl.load(CU + number + 1) - begin


@triton.jit
def pair(TREE, first: tl.constexpr):
    """Two neighbours of what `TREE` says of the program's sequence."""
    at = TREE + tl.program_id(2) * 6 + first
    return tl.load(at), tl.load(at + 1)


@triton.jit
def rows(PTR, begin, first, length, head, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses of BLOCK rows of one head from the sequence's row `first` on, [BLOCK, WIDTH]; which of them exist."""
    row = first + tl.arange(0, BLOCK)[:, None]
    at = (begin.to(tl.int64) * NUM_HEADS + row * NUM_HEADS + head) * WIDTH + tl.arange(0, WIDTH)[None, :]
    return PTR + at, row < length


@triton.jit
def load_rows(PTR, begin, first, length, head, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK rows of one head from the sequence's row `first` on, [BLOCK, WIDTH]; zeros past its end."""
    at, inside = rows(PTR, begin, first, length, head, NUM_HEADS, WIDTH, BLOCK)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_rows(
    PTR, values, begin, first, length, head, NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    at, inside = rows(PTR, begin, first, length, head, NUM_HEADS, WIDTH, BLOCK)
    tl.store(at, values.to(PTR.dtype.element_ty), mask=inside)


@triton.jit
def statistics(begin, number, head, stride, PAD: tl.constexpr):
    """Where the log-sum-exps and deltas of a sequence begin for one head."""
    return head * stride + (begin // PAD + number) * PAD


@triton.jit
def hidden(column, first, stop, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEEN: tl.constexpr):
    """Which keys from `column` on the queries from `first` on do not see, [ROWS or 1, COLUMNS]."""
    columns = (column + tl.arange(0, COLUMNS))[None, :]
    return columns > (first + tl.arange(0, ROWS))[:, None] if SEEN == CAUSAL else columns >= stop
