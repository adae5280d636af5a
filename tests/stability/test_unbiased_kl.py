"""Exact expectations over a vocabulary of six, in float64: E_old[k] is the KL divergence, and so is its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from stability.unbiased_kl import plain_k3, unbiased_kl

VOCAB_SIZE = 6
Estimate = Callable[[Tensor, Tensor, Tensor], Tensor]


class Toy(NamedTuple):
    """Logits of three policies over one position."""

    policy: Tensor
    policy_logprobs: Tensor
    behavior_logprobs: Tensor
    reference_logprobs: Tensor

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.policy, retain_graph=True)[0]

    def expected(self, estimate: Estimate) -> Tensor:
        """E under pi_old, by enumeration."""
        per_action = estimate(self.policy_logprobs, self.reference_logprobs, self.behavior_logprobs)
        return (self.behavior_logprobs.exp() * per_action).sum()

    @property
    def true_kl(self) -> Tensor:
        return (self.policy_logprobs.exp() * (self.policy_logprobs - self.reference_logprobs)).sum()


def _detached_ratio(policy: Tensor, reference: Tensor, behavior: Tensor) -> Tensor:
    return (policy - behavior).exp().detach() * plain_k3(policy, reference)


def _log_ratio(policy: Tensor, reference: Tensor, behavior: Tensor) -> Tensor:
    return policy - reference


def _plain(policy: Tensor, reference: Tensor, behavior: Tensor) -> Tensor:
    return plain_k3(policy, reference)


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    policy, behavior, reference = (torch.randn(VOCAB_SIZE, dtype=torch.float64) for _ in range(3))
    policy.requires_grad_()
    return Toy(policy, policy.log_softmax(-1), behavior.log_softmax(-1), reference.log_softmax(-1))


def test_expectation_is_the_kl_divergence(toy: Toy) -> None:
    assert toy.true_kl.item() == pytest.approx(1.166010, abs=1e-6)
    assert toy.expected(unbiased_kl).item() == pytest.approx(toy.true_kl.item(), abs=1e-14)
    assert toy.expected(_plain).item() == pytest.approx(1.807591, abs=1e-6)


def test_gradient_is_the_kl_divergences(toy: Toy) -> None:
    difference = toy.gradient(toy.expected(unbiased_kl)) - toy.gradient(toy.true_kl)
    assert difference.abs().max() < 1e-14


@pytest.mark.parametrize(
    ("estimate", "cosine", "largest"),
    [(_plain, 0.7947, 0.896), (_log_ratio, -0.8296, 1.02), (_detached_ratio, 0.9102, 0.251)],
)
def test_other_estimates_have_another_gradient(toy: Toy, estimate: Estimate, cosine: float, largest: float) -> None:
    got, want = toy.gradient(toy.expected(estimate)), toy.gradient(toy.true_kl)
    assert torch.cosine_similarity(got, want, 0).item() == pytest.approx(cosine, abs=1e-4)
    assert (got - want).abs().max().item() == pytest.approx(largest, rel=5e-3)


def test_plain_k3_follows_the_reverse_divergence_on_policy(toy: Toy) -> None:
    """Even with pi_old = pi_theta plain k3's gradient is that of KL(ref || theta); the weighted one is right."""
    on_policy = toy._replace(behavior_logprobs=toy.policy_logprobs.detach())
    reverse = (toy.reference_logprobs.exp() * (toy.reference_logprobs - toy.policy_logprobs)).sum()
    plain, weighted = (on_policy.gradient(on_policy.expected(e)) for e in (_plain, unbiased_kl))
    torch.testing.assert_close(plain, toy.gradient(reverse), rtol=0, atol=1e-14)
    torch.testing.assert_close(weighted, toy.gradient(toy.true_kl), rtol=0, atol=1e-14)


def test_samples_average_to_the_true_gradient(toy: Toy) -> None:
    num = 400_000
    draws = torch.multinomial(toy.behavior_logprobs.exp(), num, replacement=True)
    share = torch.bincount(draws, minlength=VOCAB_SIZE).double() / num

    def largest_z(estimate: Estimate) -> float:
        per_action = estimate(toy.policy_logprobs, toy.reference_logprobs, toy.behavior_logprobs)
        jacobian = torch.stack([toy.gradient(value) for value in per_action])
        mean = share @ jacobian
        error = ((share @ jacobian**2 - mean**2) / num).sqrt()
        return float(((mean - toy.gradient(toy.true_kl)).abs() / error.clamp_min(1e-12)).max())

    assert largest_z(unbiased_kl) < 4
    assert largest_z(_plain) > 100


def test_gradient_has_the_closed_form() -> None:
    torch.manual_seed(1)
    policy, reference, behavior = (-3 * torch.rand(50, dtype=torch.float64) for _ in range(3))
    policy.requires_grad_()
    gradient = torch.autograd.grad(unbiased_kl(policy, reference, behavior).sum(), policy)[0]
    torch.testing.assert_close(gradient, (policy - behavior).exp() * (policy - reference), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(lambda p: unbiased_kl(p, reference, behavior), policy)


def test_value_equals_the_formula_and_survives_large_gaps() -> None:
    """log(pi_ref / pi_theta) = 120: exp(x) overflows float32, pi_ref / pi_old does not."""
    policy, behavior, reference = (
        torch.tensor([-121.0, -0.5]),
        torch.tensor([-3.0, -0.6]),
        torch.tensor([-1.0, -0.4999]),
    )
    exact = [torch.exp(torch.tensor(2.0)).item(), _exact(-0.5, -0.6, -0.4999)]
    torch.testing.assert_close(unbiased_kl(policy, reference, behavior), torch.tensor(exact), rtol=2e-3, atol=0)
    assert plain_k3(policy, reference)[0] == torch.inf


def test_never_negative_near_the_reference() -> None:
    policy = -torch.rand(10_000) * 5
    assert (unbiased_kl(policy, policy + 1e-4 * torch.randn(10_000), policy) >= 0).all()


def _exact(policy: float, behavior: float, reference: float) -> float:
    p, b, r = (torch.tensor(v, dtype=torch.float64) for v in (policy, behavior, reference))
    return float((p - b).exp() * ((r - p).exp() - (r - p) - 1))
