"""Causal attention over packed sequences on a GPU, through `flash_kernels`: grouped queries, the same bits at each run.

Needs Triton, which comes with CUDA builds of torch only.

Shapes: T = packed tokens, S = sequences, H = heads, G = key/value heads, D = head width.
"""

# Kernels are launched by subscript, which is not typed for checkers.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from grpo.policy.layers.flash_kernels import (
    delta_kernel,
    forward_kernel,
    key_value_grad_kernel,
    query_grad_kernel,
    run_grad_kernel,
)


class Tile(NamedTuple):
    """Queries and keys one program holds at once, its warps, and loads in flight; the best of sweeps on an H100 and an
    H200."""

    rows: int
    columns: int
    warps: int
    stages: int


FORWARD = Tile(rows=64, columns=64, warps=4, stages=3)
KEY_VALUE_GRAD = Tile(rows=64, columns=64, warps=4, stages=2)
QUERY_GRAD = Tile(rows=64, columns=64, warps=4, stages=2)
PAD = 64
"""Rows that a sequence's statistics are padded to; a multiple of every tile's rows. Those of `KEY_VALUE_GRAD` must
divide those of `FORWARD`, which writes what it reads."""


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    tree: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k) v, causal within each sequence.

    Args:
        query: float [T, H, D], D one of `attention.FLASH_WIDTHS`.
        key, value: float [T, G, D]; query heads h * H / G to (h + 1) * H / G - 1 share key head h.
        cu_seqlens: int32 [S + 1], where sequences begin and end.
        max_seqlen: tokens of the longest one.
        tree: `PackedLayout.tree`, if some sequences go on from another one.

    Returns:
        [T, H, D] in the type of the query.
    """
    return _Flash.apply(  # pyright: ignore[reportReturnType]
        query.contiguous(), key.contiguous(), value.contiguous(), cu_seqlens, max_seqlen, scale, tree
    )


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913  autograd takes no containers of tensors
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        tree: Tensor | None,
    ) -> Tensor:
        out = torch.empty_like(query)
        num_sequences = len(cu_seqlens) - 1
        stride = (len(query) // PAD + num_sequences) * PAD
        lse = torch.empty(query.shape[1], stride, dtype=torch.float32, device=query.device)
        grid = (triton.cdiv(max_seqlen, FORWARD.rows), query.shape[1], num_sequences)
        blocks = (_blocks(states, FORWARD.columns) for states in (key, value))
        with torch.cuda.device_of(query):
            forward_kernel[grid](
                query, *blocks, out, lse, cu_seqlens, tree, scale, stride, **_heads(query, key), **_options(FORWARD)
            )
        ctx.save_for_backward(query, key, value, out, lse, cu_seqlens, tree)
        ctx.max_seqlen, ctx.scale = max_seqlen, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, cu_seqlens, tree = ctx.saved_tensors
        delta, num_sequences = torch.empty_like(lse), len(cu_seqlens) - 1
        grad = grads[0].contiguous()
        given = _Given(query, key, value, grad, lse, delta, cu_seqlens, tree, ctx.max_seqlen, ctx.scale)
        with torch.cuda.device_of(query):
            delta_kernel[(triton.cdiv(ctx.max_seqlen, PAD), query.shape[1], num_sequences)](
                out, given.grad, delta, cu_seqlens, lse.shape[1], H=query.shape[1], D=query.shape[2], PAD=PAD
            )
            key_grad, value_grad = _key_value_grad(given)
            query_grad = _query_grad(given)
        return query_grad, key_grad, value_grad, None, None, None, None


class _Given(NamedTuple):
    """What both kernels of the backward pass read."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    lse: Tensor
    delta: Tensor
    cu_seqlens: Tensor
    tree: Tensor | None
    max_seqlen: int
    scale: float

    @property
    def rest(self) -> tuple[Tensor, Tensor | None, float, int]:
        return self.cu_seqlens, self.tree, self.scale, self.lse.shape[1]

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1


def _key_value_grad(given: _Given) -> tuple[Tensor, Tensor]:
    query, key, value = given.query, given.key, given.value
    rows, columns, *_ = tile = KEY_VALUE_GRAD
    key_grad, value_grad = torch.empty_like(key), torch.empty_like(value)
    grid = (triton.cdiv(given.max_seqlen, columns), key.shape[1], given.num_sequences)
    read = (_blocks(query, rows), key, value, _blocks(given.grad, rows), given.lse, given.delta)
    options = {**_heads(query, key), **_options(tile)}
    parts: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if given.tree is not None:
        parts = torch.empty_like(key, dtype=torch.float32), torch.empty_like(value, dtype=torch.float32)
        run_grad_kernel[grid](*read, *parts, *given.rest, **options)
    key_value_grad_kernel[grid](*read, key_grad, value_grad, *parts, *given.rest, **options)
    return key_grad, value_grad


def _query_grad(given: _Given) -> Tensor:
    query, key, value = given.query, given.key, given.value
    rows, columns, *_ = tile = QUERY_GRAD
    query_grad = torch.empty_like(query)
    query_grad_kernel[(triton.cdiv(given.max_seqlen, rows), query.shape[1], given.num_sequences)](
        query, _blocks(key, columns), _blocks(value, columns), given.grad, given.lse, given.delta, query_grad,
        *given.rest, **_heads(query, key), **_options(tile),
    )  # fmt: skip
    return query_grad


def _blocks(states: Tensor, rows: int) -> TensorDescriptor:
    """[T, H, D] as blocks of `rows` tokens of one head."""
    return TensorDescriptor.from_tensor(states.flatten(1), [rows, states.shape[2]])


def _heads(query: Tensor, key: Tensor) -> dict[str, int]:
    return {"H": query.shape[1], "GROUP": query.shape[1] // key.shape[1], "D": query.shape[2], "PAD": PAD}


def _options(tile: Tile) -> dict[str, int]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages}
