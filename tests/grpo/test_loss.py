"""The GRPO loss against a float64 reference in plain Python, and its cases by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo.batch import TrainBatch
from grpo.loss import LossInputs, grpo_loss, sft_loss
from tests.grpo.batches import HandSequence, pack_by_hand

MIXED = [  # two domains' knobs, every branch: clipped above and below, masked, drifted but positive, mask off
    (0.7, 0.0, 0.5, 0.2, 0.28),
    (-0.3, 0.05, 0.5, 0.2, 0.28),
    (-1.1, 0.05, 0.1, 0.1, 0.1),
    (0.4, 0.3, 0.1, 0.1, 0.1),
    (-0.8, 0.3, math.inf, 0.1, 0.1),
]


def mixed_batch(seed: int, *, spread: float, unbiased_kl: bool = True) -> tuple[TrainBatch, Tensor, Tensor]:
    """Five ragged samples; the policy is `spread` nats per token away from the sampler, more where the sample is
    odd.
    """
    rng = np.random.default_rng(seed)
    sequences, policy = [], []
    for index, (advantage, beta, delta, eps_low, eps_high) in enumerate(MIXED):
        length = int(rng.integers(1, 9))
        behavior = -rng.exponential(1.0, length)
        policy += list(behavior - spread * rng.random(length) * (1 + index % 2) + 0.2 * rng.standard_normal(length))
        sequences.append(
            HandSequence(
                list(range(length + 1)),
                1,
                [[]] * length,
                behavior_logprobs=behavior.tolist(),
                advantage=advantage,
                beta=beta,
                delta=delta,
                eps_low=eps_low,
                eps_high=eps_high,
            )
        )
    batch = pack_by_hand(sequences, unbiased_kl=unbiased_kl)
    names = ("behavior_logprobs", "advantages", "beta", "delta", "eps_low", "eps_high")
    lengths = torch.bincount(batch.sample_ids).double()[batch.sample_ids]
    exact = {name: getattr(batch, name).double() for name in names} | {"loss_weights": 1 / len(MIXED) / lengths}
    batch = replace(batch, **exact)
    policy_logprobs = torch.tensor(policy, dtype=torch.float64)
    return batch, policy_logprobs, policy_logprobs + 0.3 * torch.from_numpy(rng.standard_normal(len(policy)))


def by_the_book(batch: TrainBatch, policy: Tensor, reference: Tensor) -> tuple[Tensor, list[float]]:
    """J = (1/G) sum_i (1/|o_i|) sum_t [ M min(rA, clip(r) A) - beta k ], sample by sample and token by token."""
    objective, masks = torch.zeros((), dtype=torch.float64), []
    for i in range(len(batch.domains)):
        tokens = [t for t, owner in enumerate(batch.sample_ids.tolist()) if owner == i]
        advantage, beta, delta = (float(x[i]) for x in (batch.advantages, batch.beta, batch.delta))
        drift = sum((batch.behavior_logprobs[t] - policy[t]).item() for t in tokens) / len(tokens)
        masks.append(0.0 if advantage < 0 and drift > delta else 1.0)
        for t in tokens:
            r = torch.exp(policy[t] - batch.behavior_logprobs[t])
            low, high = 1 - float(batch.eps_low[i]), 1 + float(batch.eps_high[i])
            bounded = r if low <= r.item() <= high else torch.tensor(low if r.item() < low else high, dtype=r.dtype)
            term = r * advantage if (r * advantage).item() <= (bounded * advantage).item() else bounded * advantage
            x = reference[t] - policy[t]
            k = (r if batch.unbiased_kl else 1.0) * (torch.exp(x) - x - 1)
            objective = objective + (masks[i] * term - beta * k) / len(tokens) / len(batch.domains)
    return -objective, masks


@pytest.mark.parametrize("unbiased_kl", [True, False])
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_formula_with_its_gradient(seed: int, spread: float, unbiased_kl: bool) -> None:
    batch, policy, reference = mixed_batch(seed, spread=spread, unbiased_kl=unbiased_kl)
    policy.requires_grad_()
    output = grpo_loss(LossInputs(policy, reference, torch.zeros_like(policy), batch))
    want, masks = by_the_book(batch, policy, reference)
    torch.testing.assert_close(output.loss, want, rtol=1e-12, atol=1e-12)
    got_gradient, want_gradient = (torch.autograd.grad(loss, policy)[0] for loss in (output.loss, want))
    torch.testing.assert_close(got_gradient, want_gradient, rtol=1e-10, atol=1e-12)
    assert output.sample_stats["masked"].tolist() == [1 - mask for mask in masks]


def test_the_mixed_cases_reach_every_branch() -> None:
    """Guards the comparison above: masked and unmasked negatives, clipping on both sides."""
    masked, clipped = set(), set()
    for seed in range(3):
        batch, policy, reference = mixed_batch(seed, spread=1.5)
        output = grpo_loss(LossInputs(policy, reference, torch.zeros_like(policy), batch))
        masked |= {bool(m) for m in output.sample_stats["masked"][batch.advantages < 0]}
        below = (output.token_stats["ratio"] < 1)[output.token_stats["clipped"] == 1]
        clipped |= {bool(b) for b in below}
        batch, policy, reference = mixed_batch(seed, spread=-0.5)
        output = grpo_loss(LossInputs(policy, reference, torch.zeros_like(policy), batch))
        below = (output.token_stats["ratio"] < 1)[output.token_stats["clipped"] == 1]
        clipped |= {bool(b) for b in below}
    assert masked == {True, False} and clipped == {True, False}


def hand_batch(**knobs: Any) -> TrainBatch:
    """One sample of two tokens, both drawn with log pi_old = -1."""
    return pack_by_hand([HandSequence([1, 2, 3], 1, [[], []], behavior_logprobs=[-1.0, -1.0], **knobs)])


def loss_and_gradient(
    batch: TrainBatch, policy: list[float], reference: list[float] | None
) -> tuple[float, list[float]]:
    logprobs = torch.tensor(policy, requires_grad=True)
    anchor = None if reference is None else torch.tensor(reference)
    loss = grpo_loss(LossInputs(logprobs, anchor, torch.zeros(2), batch)).loss
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad.tolist()


def test_on_policy_gradient_is_the_advantage_over_the_length() -> None:
    loss, gradient = loss_and_gradient(hand_batch(advantage=0.6), [-1.0, -1.0], None)
    assert loss == pytest.approx(-0.6) and gradient == pytest.approx([-0.3, -0.3])


def test_a_masked_sequence_keeps_its_kl_term_and_its_length() -> None:
    """Drift 2 > 0.5, so only beta * r * (log pi_theta - log pi_ref) / |o| is left: e^-2 * (-3 + 2) * 0.1 / 2."""
    batch = hand_batch(advantage=-1.0, delta=0.5, beta=0.1)
    _, gradient = loss_and_gradient(batch, [-3.0, -3.0], [-2.0, -3.0])
    assert gradient == pytest.approx([math.exp(-2) * -1 * 0.1 / 2, 0.0])
    _, without_kl = loss_and_gradient(hand_batch(advantage=-1.0, delta=0.5), [-3.0, -3.0], None)
    assert without_kl == [0.0, 0.0]


def test_a_positive_sequence_is_never_masked() -> None:
    _, gradient = loss_and_gradient(hand_batch(advantage=1.0, delta=0.5), [-3.0, -3.0], None)
    assert gradient == pytest.approx([-math.exp(-2) / 2] * 2)


@pytest.mark.parametrize(
    ("advantage", "policy", "moves"), [(1.0, -0.7, False), (1.0, -1.5, True), (-1.0, -0.7, True), (-1.0, -1.5, False)]
)
def test_clipping_stops_the_move_that_has_gone_far_enough(advantage: float, policy: float, moves: bool) -> None:
    _, gradient = loss_and_gradient(hand_batch(advantage=advantage), [policy, -1.0], None)
    assert (gradient[0] != 0) is moves and gradient[1] != 0


def test_kl_gradient_needs_no_clamp_where_the_policy_has_become_unlikely() -> None:
    """log(pi_ref / pi_theta) = 12: plain k3 would weigh this token 1.6e5; r * k3 weighs it r * 12."""
    batch = hand_batch(beta=1.0, advantage=0.0)
    _, gradient = loss_and_gradient(batch, [-13.0, -1.0], [-1.0, -1.0])
    assert gradient == pytest.approx([math.exp(-12) * -12 / 2, 0.0])


def test_a_beta_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stability\.beta is above 0"):
        loss_and_gradient(hand_batch(beta=0.1), [-1.0, -1.0], None)


def test_statistics_carry_no_gradient() -> None:
    batch, policy, reference = mixed_batch(0, spread=0.5)
    output = grpo_loss(LossInputs(policy.requires_grad_(), reference, torch.ones_like(policy), batch))
    assert set(output.token_stats) == {"ratio", "log_ratio", "clipped", "kl", "entropy"}
    assert set(output.sample_stats) == {"masked", "drift"}
    for stat in (*output.token_stats.values(), *output.sample_stats.values()):
        assert not stat.requires_grad
    torch.testing.assert_close(output.token_stats["log_ratio"], policy.detach() - batch.behavior_logprobs)
    assert (output.token_stats["kl"] >= 0).all()


def test_fine_tuning_is_the_weighted_mean_of_minus_logprobs() -> None:
    batch = pack_by_hand([HandSequence([1, 2, 3], 1, [[], []]), HandSequence([1, 2], 1, [[]])])
    policy = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    output = sft_loss(LossInputs(policy, None, torch.zeros(3), batch))
    assert output.loss.item() == pytest.approx((1.5 + 4.0) / 2)
    output.loss.backward()
    assert policy.grad is not None and policy.grad.tolist() == pytest.approx([-0.25, -0.25, -0.5])
