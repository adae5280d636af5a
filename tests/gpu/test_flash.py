"""Attention kernels on a GPU in bfloat16 against float64 scores under a block mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASES = [
    ([1000, 1, 257, 64], 8, 2, 128),
    ([63, 65, 640, 640], 4, 4, 64),
    ([130] * 9, 8, 1, 32),
]
"""Sequence lengths, query heads, key heads, head width."""


def attended(states: list[Tensor], lengths: list[int], upstream: Tensor) -> list[Tensor]:
    """The kernels' output and three gradients."""
    from grpo.layers.flash import flash_attention

    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    query, key, value = states
    out = flash_attention(query, key, value, cu_seqlens, max(lengths), query.shape[2] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, states, upstream)]


def exact(states: list[Tensor], lengths: list[int], upstream: Tensor) -> list[Tensor]:
    """The same in float64, one sequence at a time."""
    doubles = [x.detach().double().requires_grad_() for x in states]
    outputs = []
    for q, k, v in zip(*(x.split(lengths) for x in doubles), strict=True):
        group = q.shape[1] // k.shape[1]
        q, k, v = q.transpose(0, 1), *(x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = q @ k.mT * q.shape[2] ** -0.5
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        outputs.append((scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    out = torch.cat(outputs)
    return [out.detach(), *torch.autograd.grad(out, doubles, upstream.double())]


@pytest.mark.parametrize(("lengths", "heads", "key_heads", "width"), CASES, ids=str)
def test_kernels_equal_float64_within_rounding_and_themselves_bit_for_bit(
    lengths: list[int], heads: int, key_heads: int, width: int
) -> None:
    torch.manual_seed(0)
    shape = {"device": "cuda", "dtype": torch.bfloat16}
    states = [torch.randn(sum(lengths), n, width, **shape).requires_grad_() for n in (heads, key_heads, key_heads)]
    upstream = torch.randn(sum(lengths), heads, width, **shape)
    got, again = attended(states, lengths, upstream), attended(states, lengths, upstream)
    for one, other, want in zip(got, again, exact(states, lengths, upstream), strict=True):
        assert torch.equal(one, other)
        assert float((one.double() - want).norm() / want.norm()) < 6e-3
