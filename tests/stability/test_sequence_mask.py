"""The mask on sequences whose drift can be worked out by hand."""

from __future__ import annotations

import math

import torch

from stability.sequence_mask import sequence_mask


def test_drops_only_negative_samples_that_drifted() -> None:
    """Drifts 2, 2, 0.05 and 1; delta 0.5; only the first sample is positive."""
    policy = torch.tensor([-3.0, -3.0, -3.0, -3.0, -1.1, -1.0, -3.0, -1.0])
    behavior = torch.full((8,), -1.0)
    sample_ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    advantages = torch.tensor([0.75, -0.25, -0.25, -0.25])
    mask, drift = sequence_mask(policy, behavior, sample_ids, advantages, torch.full((4,), 0.5))
    assert mask.tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(drift, torch.tensor([2.0, 2.0, 0.05, 1.0]))


def test_mean_runs_over_the_sequence_not_over_single_tokens() -> None:
    """One token drifts by 1.2, two do not move: mean 0.4 stays under 0.5; with one fewer token, 0.6 does not."""
    policy, behavior = torch.tensor([-2.2, -1.0, -1.0, -2.2, -1.0]), torch.full((5,), -1.0)
    sample_ids, advantages = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([-1.0, -1.0])
    mask, _ = sequence_mask(policy, behavior, sample_ids, advantages, torch.full((2,), 0.5))
    assert mask.tolist() == [1, 0]


def test_likelier_tokens_lower_the_drift() -> None:
    """Drift is signed: the policy that made a bad answer likelier is corrected, not masked."""
    mask, drift = sequence_mask(
        torch.tensor([-0.5]), torch.tensor([-3.0]), torch.tensor([0]), torch.tensor([-1.0]), torch.tensor([0.5])
    )
    assert drift.tolist() == [-2.5] and mask.tolist() == [1]


def test_delta_is_each_samples_own_and_infinity_turns_it_off() -> None:
    policy, behavior = torch.full((3,), -2.0), torch.full((3,), -1.0)
    delta = torch.tensor([0.9, 1.1, math.inf])
    mask, _ = sequence_mask(policy, behavior, torch.arange(3), torch.full((3,), -1.0), delta)
    assert mask.tolist() == [0, 1, 1]


def test_equality_keeps_and_zero_advantage_keeps() -> None:
    policy, behavior = torch.tensor([-1.5, -9.0]), torch.tensor([-1.0, -1.0])
    mask, _ = sequence_mask(policy, behavior, torch.arange(2), torch.tensor([-1.0, 0.0]), torch.full((2,), 0.5))
    assert mask.tolist() == [1, 1]


def test_has_no_gradient_and_keeps_the_dtype() -> None:
    policy = torch.full((2,), -1.0, dtype=torch.float64, requires_grad=True)
    mask, drift = sequence_mask(
        policy, torch.zeros(2, dtype=torch.float64), torch.tensor([0, 0]), torch.tensor([-1.0, 1.0]), torch.ones(2)
    )
    assert not mask.requires_grad and not drift.requires_grad
    assert mask.dtype == drift.dtype == torch.float64
    assert drift.tolist() == [1.0, 0.0]  # a sample without sampled tokens has not drifted
