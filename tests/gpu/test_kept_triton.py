"""Log-probabilities over kept sets through the GPU kernels, against a dense masked log-softmax in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from stability import keep_sampling_mask
from stability.keep_sampling_mask import CorruptRecordError, support_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 2.2e-3}
"""Relative error, in the norm, that one rounding of a gradient may cause; bfloat16 takes 1.7e-3 of random numbers."""
UNTRUNCATED = 0


class Case(NamedTuple):
    """Arguments of `support_logprobs`."""

    hidden: Tensor
    weight: Tensor
    offsets: Tensor
    ids: Tensor
    untruncated: Tensor
    targets: Tensor
    temperature: Tensor

    def exact(self, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies and the gradients to `hidden` and `weight` in float64, from all logits."""
        hidden, weight = (m.detach().double().requires_grad_() for m in (self.hidden, self.weight))
        allowed = self.untruncated[:, None].repeat(1, len(weight))
        rows = torch.repeat_interleave(self.offsets.diff())
        allowed[rows, self.ids.long()] = True
        z = (hidden @ weight.T) / self.temperature[:, None].double()
        table = z.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        logprobs = table.gather(1, self.targets[:, None])[:, 0]
        entropy = -(table.exp() * table.masked_fill(~allowed, 0)).sum(-1)
        grads = torch.autograd.grad(logprobs @ upstream.double(), (hidden, weight))
        return logprobs.detach(), entropy.detach(), grads[0], grads[1]


def make_case(
    sizes: list[int], vocab_size: int, width: int, dtype: torch.dtype = torch.float32, common: int = 7
) -> Case:
    """Random sets of the given sizes, `UNTRUNCATED` for none; about half of them hold the id `common`."""
    torch.manual_seed(len(sizes) + vocab_size)
    sets = [torch.randperm(vocab_size)[:size] for size in sizes]
    for chosen in sets:
        if len(chosen) > 1 and torch.rand(()) < 0.5 and common not in chosen:
            chosen[int(torch.randint(len(chosen), ()))] = common
    targets = [s[torch.randint(len(s), ())] if len(s) else torch.randint(vocab_size, ()) for s in sets]
    counts = torch.tensor(sizes)
    case = Case(
        hidden=torch.randn(len(sizes), width).to(dtype),
        weight=torch.randn(vocab_size, width).div(width**0.5 / 3).to(dtype),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        ids=torch.cat(sets),
        untruncated=counts == UNTRUNCATED,
        targets=torch.stack(targets),
        temperature=0.5 + torch.rand(len(sizes)),
    )
    on_device = Case(*(tensor.cuda() for tensor in case))
    return on_device._replace(hidden=on_device.hidden.requires_grad_(), weight=on_device.weight.requires_grad_())


def upstream_of(case: Case) -> Tensor:
    """A gradient for every row, some of them 0."""
    upstream = torch.linspace(-1, 2, len(case.targets), device="cuda")
    upstream[::7] = 0
    return upstream


def relative_error(got: Tensor, want: Tensor) -> float:
    """In the norm; of an exact 0, the absolute error."""
    return float((got.double() - want).norm() / (want.norm() or 1))


def assert_exact(case: Case, num_roundings: int = 1) -> None:
    """Values and gradients; dense rows round the gradient of their logits as well, so theirs are rounded twice."""
    upstream = upstream_of(case)
    want_logprobs, want_entropy, *want_grads = case.exact(upstream)
    logprobs, entropy = support_logprobs(*case)
    torch.testing.assert_close(logprobs.double(), want_logprobs, rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=1e-5, atol=3e-5)
    assert not entropy.requires_grad
    logprobs.backward(upstream)
    for matrix, want in zip((case.hidden, case.weight), want_grads, strict=True):
        assert matrix.grad is not None and matrix.grad.dtype == matrix.dtype
        assert relative_error(matrix.grad, want) < num_roundings * ROUNDING[matrix.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "vocab_size", "width"),
    [
        ([1], 300, 16),
        ([1, 1, 1], 300, 64),
        ([3, 1, 7, 20, 2, 2, 150] * 30, 2000, 256),
        ([2, 5, 1, 9] * 100, 1000, 100),
        ([2, 5, 1, 9] * 100, 1000, 1536),
        ([600, 2, 1000, 1], 5000, 7168),
    ],
    ids=["one", "singletons", "many", "odd width", "width no power of two", "large sets"],
)
def test_equals_masked_log_softmax(sizes: list[int], vocab_size: int, width: int, dtype: torch.dtype) -> None:
    assert_exact(make_case(sizes, vocab_size, width, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [[0, 3, 90, 1, 0, 99], [0, 0, 0], [90, 99, 98], [2, 5]], ids=str)
@pytest.mark.parametrize("budget", [1, 900, 2**20], ids=["row by row", "some rows", "all rows"])
def test_wide_and_untruncated_rows_in_any_mixture(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], budget: int, dtype: torch.dtype
) -> None:
    """Sets above 50 count as wide here."""
    monkeypatch.setattr(keep_sampling_mask, "WIDE_SET", 50)
    monkeypatch.setattr(keep_sampling_mask, "GPU_DENSE_BUDGET", budget)
    assert_exact(make_case(sizes, 304, 64, dtype), num_roundings=2)


def test_a_frequent_id_summed_over_many_programs() -> None:
    """One id in all of 5000 rows: its pairs fill whole programs, whose partial sums are then added."""
    case = make_case([4, 2, 12, 3, 8] * 1000, 3000, 128)
    ids = case.ids.clone()
    has_common = torch.zeros(5000, dtype=torch.bool, device="cuda")
    has_common[torch.repeat_interleave(case.offsets.diff())[ids == 7]] = True
    first = case.offsets[:-1]
    ids[first[~has_common]] = 7
    assert_exact(case._replace(ids=ids, targets=ids[first]))


def test_int32_ids_and_strided_rows() -> None:
    case = make_case([3, 1, 7, 20] * 5, 500, 64)
    strided = torch.randn(20, 128, device="cuda")[:, ::2]
    assert_exact(case._replace(ids=case.ids.int(), hidden=strided.detach().requires_grad_()))


@pytest.mark.parametrize("sizes", [[], [UNTRUNCATED], [1, 1]], ids=str)
def test_batches_without_any_gathered_row(sizes: list[int]) -> None:
    case = make_case(sizes or [1], 400, 32)
    if not sizes:
        empty = {name: getattr(case, name)[:0] for name in ("ids", "untruncated", "targets", "temperature")}
        case = case._replace(hidden=case.hidden.detach()[:0].requires_grad_(), offsets=case.offsets[:1], **empty)
    logprobs, entropy = support_logprobs(*case)
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (len(sizes),)
    assert case.weight.grad is not None
    if UNTRUNCATED not in sizes:
        assert not logprobs.any() and not case.weight.grad.any()


@pytest.mark.parametrize("sizes", [[3, 1, 7, 20] * 20, [0, 3, 90, 1, 99, 1]], ids=["gathered", "with dense rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulator_gets_the_gradient_unrounded(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(keep_sampling_mask, "WIDE_SET", 50)
    case = make_case(sizes, 500, 64, dtype)
    upstream = upstream_of(case)
    accumulator = torch.ones(500, 64, device="cuda")
    for _ in range(2):
        logprobs, _ = support_logprobs(*case, weight_grad_accumulator=accumulator)
        logprobs.backward(upstream)
    assert case.weight.grad is None
    want = case.exact(upstream)[3]
    tolerance = ROUNDING[dtype] if UNTRUNCATED in sizes else 1e-5  # dense rows round their logits' gradient
    assert relative_error((accumulator - 1) / 2, want) < tolerance
    untouched = torch.ones(500, dtype=torch.bool, device="cuda").index_fill(0, case.ids, False)
    if UNTRUNCATED not in sizes:
        assert bool((accumulator[untouched] == 1).all())


@pytest.mark.parametrize("accumulate", [False, True])
def test_two_runs_give_the_same_bits(accumulate: bool) -> None:
    case = make_case([4, 1, 12, 3, 60, 1, 1, 0] * 500, 3000, 256, torch.bfloat16)
    upstream = upstream_of(case)
    results = []
    for _ in range(2):
        accumulator = torch.zeros(3000, 256, device="cuda") if accumulate else None
        case.hidden.grad = case.weight.grad = None
        logprobs, entropy = support_logprobs(*case, weight_grad_accumulator=accumulator)
        logprobs.backward(upstream)
        results.append((logprobs.detach(), entropy, case.hidden.grad, accumulator if accumulate else case.weight.grad))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_rows_without_upstream_gradient_and_frozen_inputs() -> None:
    case = make_case([3, 2, 9] * 10, 500, 64)
    want = case.exact(torch.ones(30, device="cuda"))
    frozen_head = case._replace(weight=case.weight.detach())
    got = torch.autograd.grad(support_logprobs(*frozen_head)[0].sum(), case.hidden)[0]
    assert relative_error(got, want[2]) < 2e-6
    frozen_trunk = case._replace(hidden=case.hidden.detach())
    got = torch.autograd.grad(support_logprobs(*frozen_trunk)[0].sum(), case.weight)[0]
    assert relative_error(got, want[3]) < 2e-6
    with torch.no_grad():
        torch.testing.assert_close(support_logprobs(*case)[0].double(), want[0], rtol=1e-5, atol=3e-5)


def test_offsets_beyond_int32_elements() -> None:
    """V x d above 2^31: the last rows of the head are read and written where they are."""
    vocab_size, width = 300_000, 7200
    weight = torch.zeros(vocab_size, width, dtype=torch.bfloat16, device="cuda")
    case = make_case([3, 2, 9] * 10, 500, width, torch.bfloat16)
    weight[-500:] = case.weight.detach()
    shift = vocab_size - 500
    large = case._replace(weight=weight.requires_grad_(), ids=case.ids + shift, targets=case.targets + shift)
    upstream = upstream_of(case)
    want = case.exact(upstream)
    logprobs, _ = support_logprobs(*large)
    torch.testing.assert_close(logprobs.double(), want[0], rtol=1e-5, atol=3e-5)
    logprobs.backward(upstream)
    assert weight.grad is not None and relative_error(weight.grad[-500:], want[3]) < ROUNDING[torch.bfloat16]


def test_a_target_outside_its_set_is_a_corrupt_record() -> None:
    case = make_case([3, 1, 4, 0], 2000, 32)
    outside = next(token for token in range(2000) if token not in case.ids.tolist())
    broken = torch.tensor([int(case.targets[0]), outside, outside, 5], device="cuda")
    with pytest.raises(CorruptRecordError, match="2 of 4 sampled tokens"):
        support_logprobs(*case._replace(targets=broken))
    with pytest.raises(CorruptRecordError, match="1 of 4"):
        support_logprobs(*case._replace(untruncated=torch.zeros(4, dtype=torch.bool, device="cuda")))
