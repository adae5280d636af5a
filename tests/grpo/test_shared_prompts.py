"""Prompts computed once: what may be shared, how it is packed and planned, and that no log-probability and no gradient
changes. The reference is plain transformers in float64 over each sample alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grpo.advantage import Segment, TrainSample, completion_segment
from grpo.batch import MicroBatch, TrainBatch, pack, plan_updates
from grpo.logprobs import token_logprobs
from grpo.policy.model import PolicyModel, prepare_policy
from grpo.shared_prompts import common_routes, find_shared_prompts, num_saved_at_least
from rollout.types import Completion, FinishReason, Replay
from stability.keep_routing import decoder_layers
from tests.moe_models import NUM_EXPERTS, NUM_LAYERS, NUM_SLOTS, build_model
from tests.samples import OBJECTIVE, make_group, make_samples, make_segment

ROUTES = (NUM_LAYERS, NUM_SLOTS, NUM_EXPERTS)


def packed(samples: Sequence[TrainSample], *, share: bool) -> TrainBatch:
    weights = [1 / len(samples) / sample.num_sampled for sample in samples]
    return pack(MicroBatch(tuple(samples), tuple(weights)), share_prompts=share)


def changed_route(sample: TrainSample, position: int) -> TrainSample:
    """The sample as an engine would record it that routed one token of the prompt differently."""
    (segment,) = sample.segments
    assert segment.replay.routed_experts is not None
    routes = segment.replay.routed_experts.copy()
    routes[position, 1] = (routes[position, 1] + 1) % NUM_EXPERTS
    replay = Replay(segment.replay.kept, routes)
    return replace(sample, segments=(replace(segment, replay=replay, num_shareable=0),))


# -- what may be shared --------------------------------------------------------------------------------------------


def test_the_documented_example() -> None:
    def sample(number: int, tokens: list[int]) -> TrainSample:
        segment = make_segment(np.random.default_rng(0), num_prompt=3, num_sampled=len(tokens) - 3, vocab=9)
        replay = Replay(None, None)
        segment = replace(segment, token_ids=np.array(tokens, np.int32), replay=replay)
        return TrainSample(0, number, "d", 0.0, OBJECTIVE, (segment,))

    batch = packed([sample(0, [5, 6, 3, 7, 1]), sample(1, [5, 6, 3, 1])], share=True)
    assert batch.token_ids.tolist() == [5, 6, 3, 7, 1, 3, 1]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 7] and batch.max_seqlen == 3
    assert batch.parents is not None and batch.parents.tolist() == [-1, 0, 0]
    assert batch.rows.tolist() == [2, 3, 5] and batch.targets.tolist() == [7, 1, 1]
    assert batch.num_saved == 2 and batch.num_sample_tokens == 9


@pytest.mark.parametrize("seed", range(20))
def test_what_is_shared_is_the_same_and_nothing_of_it_was_sampled(seed: int) -> None:
    """Few tokens and experts: prompts agree up to anywhere."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(24):
        segment = make_segment(
            rng,
            num_prompt=int(rng.integers(1, 7)),
            num_sampled=int(rng.integers(1, 4)),
            vocab=2,
            routes=(1, 1, 2) if seed % 2 else None,
        )
        samples.append(TrainSample(i % 3, i, "d", 0.0, OBJECTIVE, (segment,)))
    found = find_shared_prompts(samples)
    assert found
    assert len({m for shared in found for m in shared.members}) == sum(len(shared.members) for shared in found)
    for shared in found:
        segments = [samples[m].segments[0] for m in shared.members]
        assert len({samples[m].group_index for m in shared.members}) == 1 < len(segments) and shared.length > 0
        for segment in segments:
            assert shared.length < int(np.flatnonzero(segment.loss_mask)[0])
            assert np.array_equal(segment.token_ids[: shared.length], segments[0].token_ids[: shared.length])
            if seed % 2:
                one, two = (s.replay.routed_experts[: shared.length] for s in (segment, segments[0]))
                assert np.array_equal(one, two)


@pytest.mark.parametrize("seed", range(8))
def test_the_most_is_shared_that_one_stretch_can(seed: int) -> None:
    """Against all subsets of a small group."""
    rng = np.random.default_rng(seed)
    samples = [
        TrainSample(0, i, "d", 0.0, OBJECTIVE, (make_segment(rng, num_prompt=6, num_sampled=1, vocab=2),))
        for i in range(7)
    ]
    prompts = [sample.segments[0].token_ids[:5] for sample in samples]
    best = 0
    for subset in range(1, 2**7):
        chosen = np.stack([prompts[i] for i in range(7) if subset >> i & 1])
        length = int((chosen == chosen[0]).all(0).cumprod().sum())
        best = max(best, (len(chosen) - 1) * length)
    assert max(shared.num_saved for shared in find_shared_prompts(samples)) == best


def test_routes_that_differ_end_what_is_shared_or_leave_a_sample_alone() -> None:
    rng = np.random.default_rng(0)
    samples = make_group(rng, 0, num_prompt=20, num_sampled=[3, 4, 5, 6], routes=ROUTES)
    (shared,) = find_shared_prompts(samples)
    assert (sorted(shared.members), shared.length) == ([0, 1, 2, 3], 19)
    early = [*samples[:2], changed_route(samples[2], 3), samples[3]]
    (shared,) = find_shared_prompts(early)
    assert (sorted(shared.members), shared.length) == ([0, 1, 3], 19)
    late = [*samples[:2], changed_route(samples[2], 18), samples[3]]
    (shared,) = find_shared_prompts(late)
    assert (sorted(shared.members), shared.length) == ([0, 1, 2, 3], 18)
    unrecorded = replace(samples[1].segments[0], replay=Replay(None, None))
    assert [s.members for s in find_shared_prompts([samples[0], replace(samples[1], segments=(unrecorded,))])] == []
    assert find_shared_prompts([samples[0], replace(samples[1], group_index=1)]) == []


def test_common_routes() -> None:
    first, other = (Replay(None, np.zeros((9, 2, 2), np.uint8)) for _ in range(2))
    assert common_routes(first, first, 6) == common_routes(first, other, 6) == 6
    assert other.routed_experts is not None
    other.routed_experts[4, 1, 1] = 3
    assert common_routes(first, other, 6) == 4 and common_routes(first, other, 4) == 4
    assert common_routes(first, Replay(None, None), 6) == 0 and common_routes(Replay(None, None), first, 6) == 0
    assert common_routes(Replay(None, None), Replay(None, None), 6) == 6
    assert common_routes(first, Replay(None, np.zeros((0, 2, 2), np.uint8)), 6) == 0


def test_a_completions_segment_says_what_can_be_shared_of_its_prompt() -> None:
    for common, expected in ((0, 0), (2, 2), (4, 3)):
        completion = Completion(
            np.array([7], np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32), FinishReason.STOP, 0,
            Replay(None, None), common_routes=common,
        )  # fmt: skip
        assert completion_segment(np.arange(4, dtype=np.int32), completion).num_shareable == expected


# -- packing -------------------------------------------------------------------------------------------------------


def assert_same(one: TrainBatch, two: TrainBatch) -> None:
    for name, value in one.to_dict().items():
        other = getattr(two, name)
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name


def test_where_nothing_is_shared_the_row_is_the_same() -> None:
    samples = make_samples(3, num_groups=4, routes=ROUTES)
    assert find_shared_prompts(samples) == []
    assert_same(packed(samples, share=True), packed(samples, share=False))
    assert packed(samples, share=False).parents is None


def test_every_sampled_token_keeps_what_belongs_to_it() -> None:
    """Unrolled by its parents, the row is the unshared one: tokens, positions, routes; what is per sample is equal."""
    rng = np.random.default_rng(1)
    one, two = (make_group(rng, i, num_prompt=n, num_sampled=[3, 1, 7], routes=ROUTES) for i, n in enumerate((9, 2)))
    later = make_segment(rng, num_prompt=4, num_sampled=3, vocab=98, routes=ROUTES)
    samples = [*one[:2], replace(two[0], segments=(*two[0].segments, later)), *two[1:], one[2]]
    shared, plain = packed(samples, share=True), packed(samples, share=False)
    assert shared.parents is not None and shared.routed_experts is not None and plain.routed_experts is not None
    assert shared.num_saved == 2 * 8 + 2 * 1 and shared.num_sample_tokens == len(plain.token_ids)
    for name in ("targets", "kept_ids", "sample_ids", "loss_weights", "behavior_logprobs", "policy_versions"):
        assert torch.equal(getattr(shared, name), getattr(plain, name)), name
    assert len(shared.rows.unique()) == len(shared.rows)
    bounds, parents = shared.cu_seqlens.tolist(), shared.parents.tolist()
    assert parents == sorted(parents)
    for row, plain_row in zip(shared.rows.tolist(), plain.rows.tolist(), strict=True):
        sequence = int(np.searchsorted(bounds, row, side="right")) - 1
        path = list(range(bounds[sequence], row + 1))
        if (parent := parents[sequence]) >= 0:
            path = [*range(bounds[parent], bounds[parent + 1]), *path]
        plain_path = list(range(plain_row - int(plain.position_ids[plain_row]), plain_row + 1))
        for name in ("token_ids", "position_ids", "routed_experts"):
            assert torch.equal(getattr(shared, name)[path], getattr(plain, name)[plain_path]), name


# -- planning ------------------------------------------------------------------------------------------------------


def groups_of(seed: int, num_groups: int, *, group_size: int = 8, longest_prompt: int = 60) -> list[TrainSample]:
    rng = np.random.default_rng(seed)
    samples: list[TrainSample] = []
    for i in range(num_groups):
        num_sampled = rng.integers(1, 30, group_size).tolist()
        samples += make_group(rng, i, num_prompt=int(rng.integers(1, longest_prompt)), num_sampled=num_sampled)
    return samples


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [100, 300, 5000])
@pytest.mark.parametrize("seed", range(3))
def test_plans_with_shared_prompts_fit_and_are_complete(num_ranks: int, max_tokens: int, seed: int) -> None:
    samples = groups_of(seed, 5)
    spoilt = [replace(s.segments[0], num_shareable=s.segments[0].num_shareable // 2) for s in samples[::5]]
    samples[::5] = [replace(s, segments=(segment,)) for s, segment in zip(samples[::5], spoilt, strict=True)]
    (update,) = plan_updates(samples, num_ranks=num_ranks, max_tokens=max_tokens, share_prompts=True)
    planned = [(s.group_index, s.sample_index) for rank in update.ranks for m in rank for s in m.samples]
    assert sorted(planned) == [(s.group_index, s.sample_index) for s in samples]
    assert len({len(rank) for rank in update.ranks}) == 1
    rows = [pack(m, share_prompts=True) for rank in update.ranks for m in rank]
    assert all(len(row.token_ids) <= max_tokens for row in rows)
    (plain,) = plan_updates(samples, num_ranks=num_ranks, max_tokens=max_tokens)
    assert len(update.ranks[0]) <= len(plain.ranks[0])
    weights = {
        (s.group_index, s.sample_index): weight
        for rank in plain.ranks
        for m in rank
        for s, weight in zip(m.samples, m.token_weights, strict=True)
    }
    for rank in update.ranks:
        for m in rank:
            for s, weight in zip(m.samples, m.token_weights, strict=True):
                assert weight == weights[s.group_index, s.sample_index]


def test_whole_groups_stay_together_where_they_fit_and_ranks_are_balanced_where_they_do_not() -> None:
    rng = np.random.default_rng(0)
    samples = [s for i in range(6) for s in make_group(rng, i, num_prompt=100, num_sampled=[50] * 8)]
    (alone,) = plan_updates(samples, max_tokens=1200, share_prompts=True)
    rows = [pack(m, share_prompts=True) for m in alone.ranks[0]]
    assert len(rows) == 3 and {len(row.token_ids) for row in rows} == {2 * (99 + 8 * 51)}
    (plain,) = plan_updates(samples, max_tokens=1200)
    assert len(plain.ranks[0]) == 6
    (spread,) = plan_updates(samples[:8], num_ranks=4, max_tokens=10_000, share_prompts=True)
    assert {len(pack(m, share_prompts=True).token_ids) for (m,) in spread.ranks} == {99 + 2 * 51}


def test_without_anything_to_share_the_plan_is_the_same() -> None:
    samples = make_samples(3, num_groups=5)
    plans = [plan_updates(samples, num_ranks=2, max_tokens=40, share_prompts=share) for share in (False, True)]
    named = [[[(s.group_index, s.sample_index) for m in rank for s in m.samples] for rank in p[0].ranks] for p in plans]
    assert named[0] == named[1]


@pytest.mark.parametrize("seed", range(20))
def test_planning_promises_no_more_than_packing_saves(seed: int) -> None:
    """Prompts that were routed differently anywhere, beside answers for which they are too short to be worth it."""
    rng = np.random.default_rng(seed)
    num_sampled = np.where(rng.random(9) < 0.3, 400, rng.integers(1, 60, 9)).tolist()
    samples = make_group(rng, 0, num_prompt=20, num_sampled=num_sampled, routes=ROUTES)
    for i in range(1, 9):
        if rng.random() < 0.5:
            position = int(rng.integers(0, 20))
            sample = changed_route(samples[i], position)
            known = replace(sample.segments[0], num_shareable=min(position, 19))
            samples[i] = replace(sample, segments=(known,))
    promised = num_saved_at_least(samples)
    assert 0 <= promised <= packed(samples, share=True).num_saved
    assert promised > 0


def test_a_prompt_too_short_for_its_answer_is_repeated() -> None:
    rng = np.random.default_rng(0)
    samples = make_group(rng, 0, num_prompt=9, num_sampled=[503, 30, 504, 2])
    (shared,) = find_shared_prompts(samples)
    assert sorted(shared.members) == [0, 1, 3] and num_saved_at_least(samples) == shared.num_saved == 16


# -- exactness -----------------------------------------------------------------------------------------------------


class _ForcedRouter(nn.Module):
    """An independent replay: a softmax router that looks its experts up."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.weight, self.norm = router.weight, router.norm_topk_prob
        self.ids: Tensor

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probs = (hidden @ self.weight.T).softmax(-1)
        ids = torch.where(self.ids[:, :1] < 0, probs.topk(NUM_SLOTS).indices, self.ids)
        gates = probs.gather(-1, ids)
        return probs, gates / gates.sum(-1, keepdim=True) if self.norm else gates, ids


def reference(name: str, samples: Sequence[TrainSample], weights: Sequence[float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities over the kept sets, and gradients of their weighted sum, one segment at a time in float64."""
    model: Any = build_model(name).double()
    model.set_experts_implementation("eager")  # the others know no float64
    routers = []
    if name != "qwen3":
        for layer in decoder_layers(model):
            block: Any = layer.mlp
            block.gate = _ForcedRouter(block.gate)
            routers.append(block.gate)
    logprobs = []
    for sample, weight in zip(samples, weights, strict=True):
        for segment in sample.segments:
            values = _segment_logprobs(model, routers, segment)
            (weight * values).sum().backward()
            logprobs.append(values.detach())
    return torch.cat(logprobs), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _segment_logprobs(model: Any, routers: Sequence[_ForcedRouter], segment: Segment) -> Tensor:
    record: Any = segment.replay
    for index, router in enumerate(routers):
        recorded = torch.from_numpy(record.routed_experts[:, index].astype(np.int64))
        router.ids = torch.cat([recorded, -torch.ones(1, NUM_SLOTS, dtype=torch.int64)])
    logits = model(input_ids=torch.from_numpy(segment.token_ids[None].astype(np.int64)), use_cache=False).logits[0]
    values = []
    for t, position in enumerate(np.flatnonzero(segment.loss_mask)):
        kept = record.kept.row(t).tolist()
        values.append(logits[position - 1][kept].log_softmax(-1)[kept.index(segment.token_ids[position])])
    return torch.stack(values)


def gradients(policy: PolicyModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in policy.module.named_parameters() if p.grad is not None}


def tree_samples(name: str) -> list[TrainSample]:
    """Prompts of 2 and of 60, a single sampled token, routes that differ in the prompt, a sample of two segments."""
    rng = np.random.default_rng(2)
    routes = None if name == "qwen3" else ROUTES
    long = make_group(rng, 0, num_prompt=60, num_sampled=[5, 1, 12, 7, 30], routes=routes)
    short = make_group(rng, 1, num_prompt=2, num_sampled=[4, 4, 1], routes=routes)
    alone = make_group(rng, 2, num_prompt=9, num_sampled=[6], routes=routes)
    if routes is not None:
        long[2], long[4] = changed_route(long[2], 0), changed_route(long[4], 40)
    later = make_segment(rng, num_prompt=5, num_sampled=4, vocab=98, routes=routes)
    short[1] = replace(short[1], segments=(*short[1].segments, later))
    return [long[0], *short, *long[1:], *alone]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_shared_rows_equal_each_sample_alone_in_float64(name: str, checkpointing: bool) -> None:
    samples = tree_samples(name)
    weights = [1 / len(samples) / sample.num_sampled for sample in samples]
    want, want_grads = reference(name, samples, weights)
    policy = prepare_policy(build_model(name), keep_routing=True, gradient_checkpointing=checkpointing)
    assert policy.shares_prompts
    got = []
    for rows in (samples[:5], samples[5:]):  # one group in two micro-batches
        batch = packed(rows, share=True)
        assert batch.parents is not None and batch.num_saved > 20
        logprobs = token_logprobs(policy, batch).logprobs
        (batch.loss_weights * len(rows) / len(samples) * logprobs).sum().backward()
        got.append(logprobs.detach())
    torch.testing.assert_close(torch.cat(got).double(), want, rtol=0, atol=3e-6)
    got_grads = gradients(policy)
    assert got_grads.keys() == want_grads.keys()
    for key, grad in want_grads.items():
        assert float((got_grads[key] - grad).norm() / grad.norm()) < 1e-5, key


def test_shared_and_unshared_rows_agree_and_repeat_bit_for_bit() -> None:
    samples, results = tree_samples("qwen3_moe"), []
    for share in (False, True, True):
        policy = prepare_policy(build_model("qwen3_moe"), keep_routing=True, gradient_checkpointing=False)
        batch = packed(samples, share=share)
        logprobs = token_logprobs(policy, batch).logprobs
        (batch.loss_weights * logprobs).sum().backward()
        results.append((logprobs.detach(), gradients(policy)))
    (want, want_grads), (got, got_grads), (again, again_grads) = results
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert torch.equal(got, again)
    for key, grad in want_grads.items():
        assert float((got_grads[key] - grad).norm() / grad.norm()) < 5e-6, key
        assert torch.equal(got_grads[key], again_grads[key])
