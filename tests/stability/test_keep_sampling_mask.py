"""Support log-probabilities against a dense masked log-softmax in float64, and the enumeration that shows why
supports matter.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from stability import keep_sampling_mask
from stability.keep_sampling_mask import CorruptRecordError, kept_logprobs, support_logprobs


class Case(NamedTuple):
    """Arguments of `support_logprobs`."""

    hidden: Tensor
    weight: Tensor
    offsets: Tensor
    ids: Tensor
    untruncated: Tensor
    targets: Tensor
    temperature: Tensor

    def allowed(self) -> Tensor:
        """bool [N, V], from the CSR by plain loops."""
        mask = self.untruncated[:, None].repeat(1, len(self.weight))
        for row in range(len(self.targets)):
            for token in self.ids[self.offsets[row] : self.offsets[row + 1]].tolist():
                mask[row, token] = True
        return mask

    def dense(self) -> tuple[Tensor, Tensor]:
        logits = (self.hidden @ self.weight.T) / self.temperature[:, None]
        logprobs = logits.masked_fill(~self.allowed(), -torch.inf).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0)).sum(-1)
        return logprobs.gather(1, self.targets[:, None])[:, 0], entropy


def make_case(sizes: list[int], vocab_size: int, width: int = 5, dtype: torch.dtype = torch.float64) -> Case:
    """Random sets of the given sizes, 0 = untruncated; the target is one of the set."""
    generator = torch.Generator().manual_seed(len(sizes) + vocab_size)
    sets = [torch.randperm(vocab_size, generator=generator)[:size].sort().values for size in sizes]
    targets = [int(torch.randint(size or vocab_size, (1,), generator=generator)) for size in sizes]
    return Case(
        hidden=torch.randn(len(sizes), width, generator=generator, dtype=dtype).requires_grad_(),
        weight=torch.randn(vocab_size, width, generator=generator, dtype=dtype).requires_grad_(),
        offsets=torch.tensor([0, *itertools.accumulate(sizes)]),
        ids=torch.cat(sets),
        untruncated=torch.tensor([size == 0 for size in sizes]),
        targets=torch.stack([s[t] if len(s) else torch.tensor(t) for s, t in zip(sets, targets, strict=True)]),
        temperature=0.5 + torch.rand(len(sizes), generator=generator),
    )


def assert_matches_dense(case: Case) -> None:
    """Values and both gradients, for a weighted sum of log-probabilities."""
    logprobs, entropy = support_logprobs(*case)
    want_logprobs, want_entropy = case.dense()
    torch.testing.assert_close(logprobs, want_logprobs, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, want_entropy, rtol=0, atol=1e-12)
    upstream = torch.linspace(-1, 2, len(case.targets), dtype=logprobs.dtype)
    got = torch.autograd.grad((upstream * logprobs).sum(), (case.hidden, case.weight))
    want = torch.autograd.grad((upstream * want_logprobs).sum(), (case.hidden, case.weight))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("small_vocabulary", [0, 10_000], ids=["gathered", "dense"])
@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [3, 1, 7, 20, 2, 2], [40] * 5], ids=str)
def test_equals_masked_log_softmax(monkeypatch: pytest.MonkeyPatch, sizes: list[int], small_vocabulary: int) -> None:
    monkeypatch.setattr(keep_sampling_mask, "SMALL_VOCABULARY", small_vocabulary)
    assert_matches_dense(make_case(sizes, vocab_size=40))


@pytest.mark.parametrize("budget", [1, 300, 2**20], ids=["row by row", "some rows", "all rows"])
@pytest.mark.parametrize("sizes", [[0, 3, 90, 1, 0, 99], [0, 0, 0], [90, 99, 98], [2, 5]], ids=str)
def test_wide_and_untruncated_rows_in_any_mixture(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], budget: int
) -> None:
    """Sets above 50 count as wide here; every chunk size gives the same numbers."""
    monkeypatch.setattr(keep_sampling_mask, "SMALL_VOCABULARY", 0)
    monkeypatch.setattr(keep_sampling_mask, "WIDE_SET", 50)
    monkeypatch.setattr(keep_sampling_mask, "DENSE_BUDGET", budget)
    monkeypatch.setattr(keep_sampling_mask, "CPU_GATHER_BUDGET", budget)
    assert_matches_dense(make_case(sizes, vocab_size=100))


def test_gradients_pass_gradcheck() -> None:
    case = make_case([3, 1, 6], vocab_size=12, width=3)
    rest = (case.offsets, case.ids, case.targets, case.temperature)
    assert torch.autograd.gradcheck(lambda h, w: kept_logprobs(h, w, *rest)[0], (case.hidden, case.weight))


def test_float32_is_close_and_half_precision_sums_in_float32() -> None:
    sizes = [8, 1, 30, 200, 3] * 8
    exact = make_case(sizes, vocab_size=1000, width=64)
    single = exact._replace(hidden=exact.hidden.detach().float(), weight=exact.weight.detach().float())
    torch.testing.assert_close(support_logprobs(*single)[0].double(), exact.dense()[0], rtol=1e-5, atol=2e-5)
    half = exact._replace(
        hidden=exact.hidden.detach().bfloat16().requires_grad_(),
        weight=exact.weight.detach().bfloat16().requires_grad_(),
    )
    rounded = exact._replace(hidden=half.hidden.detach().double(), weight=half.weight.detach().double())
    logprobs, _ = support_logprobs(*half)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), rounded.dense()[0], rtol=1e-5, atol=2e-5)
    gradients = torch.autograd.grad(logprobs.sum(), (half.hidden, half.weight))
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}


def test_a_frozen_head_still_gives_the_hidden_gradient() -> None:
    case = make_case([3, 2], vocab_size=500)
    frozen = case._replace(weight=case.weight.detach())
    got = torch.autograd.grad(support_logprobs(*frozen)[0].sum(), case.hidden)[0]
    torch.testing.assert_close(got, torch.autograd.grad(case.dense()[0].sum(), case.hidden)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [[3, 1, 7, 20], [0, 3, 90, 1], [0, 0]], ids=str)
def test_accumulator_gets_the_weight_gradient_instead_of_autograd(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    monkeypatch.setattr(keep_sampling_mask, "WIDE_SET", 50)
    case = make_case(sizes, vocab_size=300)
    accumulator = torch.ones_like(case.weight)
    for _ in range(2):
        support_logprobs(*case, weight_grad_accumulator=accumulator)[0].sum().backward()
    want = torch.autograd.grad(case.dense()[0].sum(), case.weight)[0]
    torch.testing.assert_close(accumulator.detach(), 1 + 2 * want, rtol=0, atol=1e-12)
    assert case.weight.grad is None


def test_an_accumulator_of_another_type_is_refused() -> None:
    case = make_case([3, 2], vocab_size=300)
    with pytest.raises(ValueError, match=r"torch.float16 \[300, 5\]; give a torch.float64"):
        support_logprobs(*case, weight_grad_accumulator=torch.zeros(300, 5, dtype=torch.float16))


def test_entropy_has_no_gradient() -> None:
    _, entropy = support_logprobs(*make_case([3, 2], vocab_size=500))
    assert not entropy.requires_grad


@pytest.mark.parametrize("vocab_size", [40, 2000], ids=["dense", "gathered"])
def test_a_target_outside_its_set_is_a_corrupt_record(vocab_size: int) -> None:
    case = make_case([3, 2, 4], vocab_size)
    outside = next(token for token in range(vocab_size) if token not in case.ids.tolist())
    broken = case._replace(targets=torch.tensor([int(case.targets[0]), outside, outside]))
    with pytest.raises(CorruptRecordError, match="2 of 3 sampled tokens"):
        support_logprobs(*broken)


@pytest.mark.parametrize("vocab_size", [40, 2000], ids=["dense", "gathered"])
def test_an_empty_set_is_never_the_full_vocabulary(vocab_size: int) -> None:
    case = make_case([3, 0], vocab_size)
    with pytest.raises(CorruptRecordError, match="1 of 2"):
        support_logprobs(*case._replace(untruncated=torch.tensor([False, False])))


class Chain(NamedTuple):
    """A three-step toy: the logits of each step depend on the previous token through a table."""

    policy: Tensor  # float64 [states, V]
    behavior: Tensor  # float64 [states, V]
    rewards: Tensor  # float64 [V, V, V]

    def table(self, logits: Tensor, keep: Tensor) -> Tensor:
        """Log-probabilities [states, V] over each state's set through `support_logprobs`; -inf outside."""
        states, tokens = keep.nonzero().T
        sizes = keep.sum(1)
        ids = torch.cat([tokens[states == state].repeat(int(sizes[state])) for state in range(len(keep))])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes[states].cumsum(0)])
        one_hot = torch.eye(len(keep), dtype=torch.float64)[states]
        plain = torch.zeros(len(states), dtype=torch.bool)
        logprobs, _ = support_logprobs(one_hot, logits.T, offsets, ids, plain, tokens, torch.ones(len(states)))
        return torch.full_like(keep, -torch.inf, dtype=torch.float64).index_put((states, tokens), logprobs)

    def expectations(self, sampler: Tensor, learner: Tensor) -> tuple[float, float, Tensor]:
        """E_old of the first token's and of the sequence's ratio, and the gradient of the reward's surrogate."""
        old, new = self.table(self.behavior, sampler), self.table(self.policy, learner)
        first = sequence = 0.0
        surrogate = torch.zeros((), dtype=torch.float64)
        for actions in itertools.product(range(6), repeat=3):
            steps = list(zip((6, *actions[:-1]), actions, strict=True))
            log_old = torch.stack([old[step] for step in steps]).sum()
            if log_old == -torch.inf:
                continue
            ratio = (torch.stack([new[step] for step in steps]).sum() - log_old).exp()
            first += (log_old + new[steps[0]] - old[steps[0]]).exp().item()
            sequence += (log_old.exp() * ratio).item()
            surrogate = surrogate + log_old.exp() * ratio * self.rewards[actions]
        return first, sequence, torch.autograd.grad(surrogate, self.policy)[0]


@pytest.fixture(scope="module")
def chain() -> Chain:
    torch.manual_seed(0)
    single_step = [torch.randn(6, dtype=torch.float64) for _ in range(3)]  # these draws come first in the toy's stream
    torch.multinomial(single_step[1].softmax(-1).float(), 400_000, replacement=True)
    policy = torch.randn(7, 6, dtype=torch.float64).mul(1.2).requires_grad_()
    behavior = policy.detach() + 0.3 * torch.randn(7, 6, dtype=torch.float64)
    return Chain(policy, behavior, torch.randn(6, 6, 6, dtype=torch.float64))


def _top3(logits: Tensor) -> Tensor:
    return torch.zeros(logits.shape, dtype=torch.bool).scatter(1, logits.detach().topk(3, -1).indices, True)


def _true_gradient(chain: Chain, keep: Tensor) -> Tensor:
    """Of the expected reward of the truncated policy itself, by dense log-softmax and enumeration."""
    table = chain.policy.masked_fill(~keep, -torch.inf).log_softmax(-1)
    value = torch.zeros((), dtype=torch.float64)
    for actions in itertools.product(range(6), repeat=3):
        logprob = torch.stack([table[step] for step in zip((6, *actions[:-1]), actions, strict=True)]).sum()
        if torch.isfinite(logprob):
            value = value + logprob.exp() * chain.rewards[actions]
    return torch.autograd.grad(value, chain.policy)[0]


def test_the_samplers_sets_on_both_sides_make_the_ratio_unbiased(chain: Chain) -> None:
    keep = _top3(chain.behavior)
    first, sequence, gradient = chain.expectations(keep, keep)
    assert first == pytest.approx(1, abs=1e-12) and sequence == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(gradient, _true_gradient(chain, keep), rtol=0, atol=1e-12)


def test_the_full_vocabulary_on_the_learners_side_does_not(chain: Chain) -> None:
    keep = _top3(chain.behavior)
    first, sequence, gradient = chain.expectations(keep, torch.ones_like(keep))
    true = _true_gradient(chain, keep)
    assert first == pytest.approx(0.779268, abs=1e-6)
    assert sequence == pytest.approx(0.575143, abs=1e-6)
    assert float((gradient - true).norm() / true.norm()) == pytest.approx(0.442, abs=1e-3)


def test_the_learners_own_sets_do_not(chain: Chain) -> None:
    keep, own = _top3(chain.behavior), _top3(chain.policy)
    assert int((keep != own).any(1).sum()) == 1
    _, sequence, gradient = chain.expectations(keep, own)
    true = _true_gradient(chain, keep)
    assert sequence == pytest.approx(0.957810, abs=1e-6)
    assert float((gradient - true).norm() / true.norm()) == pytest.approx(0.152, abs=1e-3)
