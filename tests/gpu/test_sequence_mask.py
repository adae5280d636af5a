"""The sequence mask's sums on a GPU: those of float64, and the same bits at every call."""

from __future__ import annotations

import pytest
import torch

from stability.sequence_mask import sequence_mask

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_drift_is_exact_and_reproducible() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, behavior = torch.randn(2, 200_000, generator=generator)
    samples = torch.randint(0, 40, (200_000,), generator=generator)
    advantages, delta = torch.randn(40, generator=generator), torch.full((40,), 1e-3)
    _, want = sequence_mask(policy.double(), behavior.double(), samples, advantages, delta)
    arguments = [tensor.cuda() for tensor in (policy, behavior, samples, advantages, delta)]
    mask, drift = sequence_mask(*arguments)
    torch.testing.assert_close(drift.double().cpu(), want, atol=1e-6, rtol=0)
    for _ in range(5):
        again, drift_again = sequence_mask(*arguments)
        assert torch.equal(drift, drift_again) and torch.equal(mask, again)
