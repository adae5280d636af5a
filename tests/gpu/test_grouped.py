"""The experts' weight gradients on a GPU in bfloat16 against float64: nothing is rounded on the way to float32."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASES = [
    ([0, 1, 63, 64, 65, 0, 500, 7, 0], 384, 256),
    ([130, 2, 300], 192, 96),
    ([5], 8, 32),
]
"""Rows of each expert, widths of both sides."""


@pytest.mark.parametrize(("sizes", "width", "other"), CASES, ids=str)
def test_kernel_equals_float64_within_float32_and_itself_bit_for_bit(sizes: list[int], width: int, other: int) -> None:
    from grpo.policy.layers import grouped

    torch.manual_seed(0)
    left = torch.randn(sum(sizes), width, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(sum(sizes), other, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor(sizes, device="cuda").cumsum(0).int()
    pairs = zip(left.double().split(sizes), right.double().split(sizes), strict=True)
    want = torch.stack([x.T @ y for x, y in pairs])
    before = torch.randn_like(want, dtype=torch.float32)
    results = []
    for _ in range(2):
        written, added = torch.full_like(before, torch.nan), before.clone()
        grouped.weight_grad(written, left, right, ends, add=False)
        grouped.weight_grad(added, left, right, ends, add=True)
        results.append((written, added))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    written, added = results[0]
    assert float((written - want).norm() / want.norm()) < 1e-6
    assert float((added - before - want).norm() / want.norm()) < 1e-6
    untouched = torch.tensor(sizes) == 0
    assert torch.equal(added[untouched], before[untouched]) and not written[untouched].any()
