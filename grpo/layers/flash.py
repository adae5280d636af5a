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

from grpo.layers.flash_kernels import delta_kernel, forward_kernel, key_value_grad_kernel, query_grad_kernel


class Tile(NamedTuple):
    """Queries and keys one program holds at once, its warps, and loads in flight; the best of a sweep on an H100."""

    rows: int
    columns: int
    warps: int
    stages: int


FORWARD = Tile(rows=64, columns=64, warps=4, stages=3)
KEY_VALUE_GRAD = Tile(rows=64, columns=64, warps=4, stages=2)
QUERY_GRAD = Tile(rows=128, columns=64, warps=8, stages=3)
DELTA_ROWS = 64


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """softmax(scale * q k) v, causal within each sequence.

    Args:
        query: float [T, H, D], D one of `attention.FLASH_WIDTHS`.
        key, value: float [T, G, D]; query heads h * H / G to (h + 1) * H / G - 1 share key head h.
        cu_seqlens: int32 [S + 1], where sequences begin and end.
        max_seqlen: tokens of the longest one.

    Returns:
        [T, H, D] in the type of the query.
    """
    return _Flash.apply(  # pyright: ignore[reportReturnType]
        query.contiguous(), key.contiguous(), value.contiguous(), cu_seqlens, max_seqlen, scale
    )


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
    ) -> Tensor:
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[1], len(query), dtype=torch.float32, device=query.device)
        grid = (triton.cdiv(max_seqlen, FORWARD.rows), query.shape[1], len(cu_seqlens) - 1)
        with torch.cuda.device_of(query):
            forward_kernel[grid](
                query, key, value, out, lse, cu_seqlens, scale, len(query), **_heads(query, key), **_options(FORWARD)
            )
        ctx.save_for_backward(query, key, value, out, lse, cu_seqlens)
        ctx.max_seqlen, ctx.scale = max_seqlen, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, cu_seqlens = ctx.saved_tensors
        grad = grads[0].contiguous()
        query_grad, key_grad, value_grad = (torch.empty_like(states) for states in (query, key, value))
        delta = torch.empty_like(lse)
        num_tokens, heads, num_sequences = len(query), query.shape[1], len(cu_seqlens) - 1
        given, rest = (query, key, value, grad, lse, delta), (cu_seqlens, ctx.scale, num_tokens)
        with torch.cuda.device_of(query):
            delta_kernel[(triton.cdiv(num_tokens, DELTA_ROWS), heads)](
                out, grad, delta, num_tokens, H=heads, D=query.shape[2], ROWS=DELTA_ROWS
            )
            blocks = triton.cdiv(ctx.max_seqlen, KEY_VALUE_GRAD.columns)
            key_value_grad_kernel[(blocks, key.shape[1], num_sequences)](
                *given, key_grad, value_grad, *rest, **_heads(query, key), **_options(KEY_VALUE_GRAD)
            )
            blocks = triton.cdiv(ctx.max_seqlen, QUERY_GRAD.rows)
            query_grad_kernel[(blocks, heads, num_sequences)](
                *given, query_grad, *rest, **_heads(query, key), **_options(QUERY_GRAD)
            )
        return query_grad, key_grad, value_grad, None, None, None


def _heads(query: Tensor, key: Tensor) -> dict[str, int]:
    return {"H": query.shape[1], "GROUP": query.shape[1] // key.shape[1], "D": query.shape[2]}


def _options(tile: Tile) -> dict[str, int]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages}
