"""Attention kernels on a GPU in bfloat16 against float64, one sequence at a time behind what it goes on from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASES: list[tuple[list[int], list[int], int, int, int]] = [
    ([1000, 1, 257, 64], [], 8, 2, 128),
    ([63, 65, 640, 640], [], 4, 4, 64),
    ([130] * 9, [], 8, 1, 32),
    ([128, *[512, 1, 65, 64, 300, 512, 33]], [-1, *[0] * 7], 16, 8, 128),
    ([1, 200, 77, 1, 640, 130, 1, 64], [-1, -1, -1, 0, 0, 1, 1, 1], 8, 2, 64),
    ([3000, 64, *range(1, 400, 5)], [-1, -1, *[0] * 40, *[1] * 40], 8, 1, 32),
]
"""Sequence lengths, the sequences they go on from (none = all are whole), query heads, key heads, head width."""


def attended(states: list[Tensor], lengths: list[int], parents: list[int], upstream: Tensor) -> list[Tensor]:
    """The kernels' output and three gradients."""
    from grpo.policy.layers.attention import PackedLayout, attend

    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    tree = torch.tensor(parents, dtype=torch.int32, device="cuda") if parents else None
    query, key, value = states
    out = attend(query, key, value, PackedLayout(cu_seqlens, max(lengths), tree), None, None)
    return [out.detach(), *torch.autograd.grad(out, states, upstream)]


def exact(states: list[Tensor], lengths: list[int], parents: list[int], upstream: Tensor) -> list[Tensor]:
    """The same in float64, one sequence at a time."""
    doubles = [x.detach().double().requires_grad_() for x in states]
    queries, keys, values = (x.split(lengths) for x in doubles)
    outputs = []
    for q, k, v, parent in zip(queries, keys, values, parents or [-1] * len(lengths), strict=True):
        if parent >= 0:
            k, v = torch.cat([keys[parent], k]), torch.cat([values[parent], v])
        group = q.shape[1] // k.shape[1]
        q, k, v = q.transpose(0, 1), *(x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = q @ k.mT * q.shape[2] ** -0.5
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
        outputs.append((scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    out = torch.cat(outputs)
    return [out.detach(), *torch.autograd.grad(out, doubles, upstream.double())]


@pytest.mark.parametrize(("lengths", "parents", "heads", "key_heads", "width"), CASES, ids=str)
def test_kernels_equal_float64_within_rounding_and_themselves_bit_for_bit(
    lengths: list[int], parents: list[int], heads: int, key_heads: int, width: int
) -> None:
    torch.manual_seed(0)
    shape = {"device": "cuda", "dtype": torch.bfloat16}
    states = [torch.randn(sum(lengths), n, width, **shape).requires_grad_() for n in (heads, key_heads, key_heads)]
    upstream = torch.randn(sum(lengths), heads, width, **shape)
    got, again = (attended(states, lengths, parents, upstream) for _ in range(2))
    for one, other, want in zip(got, again, exact(states, lengths, parents, upstream), strict=True):
        assert torch.equal(one, other)
        assert float((one.double() - want).norm() / want.norm()) < 6e-3
