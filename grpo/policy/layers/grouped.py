"""Weight gradients of a layer's experts, added straight to float32 ones: one Triton kernel.

A library's grouped product would round them to half precision and write them, to be read, widened and added by another
kernel. Here every tile is summed in float32 and added to what is there, by bulk additions that the memory does: each
entry gets one, so two runs give the same bits.

Needs Triton, which comes with CUDA builds of torch only.

Shapes: R = rows, sorted by expert, E = experts, M and N = widths of the two sides.
"""

# Triton's kernel language and launches by subscript are not typed for checkers.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# ruff: noqa: PLR0913  a kernel takes its tensors one by one
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(NamedTuple):
    """Entries one program computes, rows of R it holds at once, its warps, and loads in flight."""

    height: int
    width: int
    depth: int
    warps: int
    stages: int


TILE = Tile(height=128, width=128, depth=32, warps=4, stages=6)
"""The best of a sweep on an H200: two programs share a multiprocessor, one adding while the other multiplies."""


def weight_grad(total: Tensor, left: Tensor, right: Tensor, ends: Tensor, *, add: bool) -> None:
    """total[e] = left[rows of e]^T right[rows of e], or += with `add`; zero, or nothing, for an expert without rows.

    Args:
        total: float32 [E, M, N], contiguous.
        left: float [R, M], contiguous, R > 0; rows of a multiple of 16 bytes.
        right: float [R, N], in the same type and likewise.
        ends: int32 [E], the end of each expert's rows.
    """
    experts, height, width = total.shape
    tiles = experts * triton.cdiv(height, TILE.height) * triton.cdiv(width, TILE.width)
    with torch.cuda.device_of(left):
        weight_grad_kernel[(tiles,)](
            left,
            right,
            TensorDescriptor.from_tensor(left, [TILE.depth, TILE.height]),
            TensorDescriptor.from_tensor(right, [TILE.depth, TILE.width]),
            total,
            ends,
            M=height,
            N=width,
            HEIGHT=TILE.height,
            WIDTH=TILE.width,
            DEPTH=TILE.depth,
            ADD=add,
            num_warps=TILE.warps,
            num_stages=TILE.stages,
        )


@triton.jit
def _load_tail(PTR, row, end, first, NUM: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows from `row` on, columns from `first` on, [DEPTH, BLOCK]; zeros from row `end` and column NUM on."""
    rows = row + tl.arange(0, DEPTH)[:, None]
    columns = first + tl.arange(0, BLOCK)[None, :]
    return tl.load(PTR + rows.to(tl.int64) * NUM + columns, mask=(rows < end) & (columns < NUM), other=0.0)


@triton.jit
def weight_grad_kernel(
    LEFT,
    RIGHT,
    LEFT_BLOCKS,
    RIGHT_BLOCKS,
    TOTAL,
    ENDS,
    M: tl.constexpr,
    N: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ADD: tl.constexpr,
):
    """One tile of one expert's gradient. Whole blocks of rows come by bulk copies, the last ones with a mask: behind
    them are the next expert's."""
    down: tl.constexpr = (M + HEIGHT - 1) // HEIGHT
    tiles: tl.constexpr = (N + WIDTH - 1) // WIDTH * down
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    top, left = (tile % down) * HEIGHT, (tile // down) * WIDTH
    begin = tl.load(ENDS + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ENDS + expert)
    tail = begin + (end - begin) // DEPTH * DEPTH
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    if tail < end:  # first, while `total` takes no registers yet
        x = _load_tail(LEFT, tail, end, top, M, DEPTH, HEIGHT)
        y = _load_tail(RIGHT, tail, end, left, N, DEPTH, WIDTH)
        total = tl.dot(tl.trans(x), y, total, input_precision="ieee")
    for row in range(begin, tail, DEPTH):
        x = LEFT_BLOCKS.load([row, top])
        y = RIGHT_BLOCKS.load([row, left])
        total = tl.dot(tl.trans(x), y, total, input_precision="ieee")
    rows = top + tl.arange(0, HEIGHT)[:, None]
    columns = left + tl.arange(0, WIDTH)[None, :]
    at = TOTAL + expert.to(tl.int64) * (M * N) + rows * N + columns
    inside = (rows < M) & (columns < N)
    if ADD:
        tl.atomic_add(at, total, mask=inside, sem="relaxed")
    else:
        tl.store(at, total, mask=inside)
