"""Packing: every token of every sample exactly once, in any number of micro-batches and ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo.advantage import Segment, TrainSample
from grpo.batch import MicroBatch, pack, plan_updates
from rollout.types import KeptSets, Replay
from tests.samples import OBJECTIVE, make_samples, make_segment


def test_the_documented_example():
    first = Segment(
        token_ids=np.array([5, 6, 7, 1], np.int32),
        loss_mask=np.array([False, False, True, True]),
        behavior_logprobs=np.array([0, 0, -0.1, -0.2], np.float32),
        policy_versions=np.array([-1, -1, 3, 4], np.int32),
        replay=Replay(KeptSets(np.array([0, 2, 3]), np.array([7, 9, 1], np.int32)), np.full((3, 2, 2), 6, np.uint8)),
    )
    second = Segment(
        token_ids=np.array([9, 1], np.int32),
        loss_mask=np.array([False, True]),
        behavior_logprobs=np.array([0, -0.3], np.float32),
        policy_versions=np.array([-1, 4], np.int32),
        replay=Replay(None, np.full((1, 2, 2), 5, np.uint8)),
    )
    samples = (
        TrainSample(0, 0, "a", 0.5, replace(OBJECTIVE, delta=None), (first,)),
        TrainSample(0, 1, "b", -0.5, replace(OBJECTIVE, temperature=0.5), (second,)),
    )
    batch = pack(MicroBatch(samples, (0.25, 0.5)))
    assert batch.token_ids.tolist() == [5, 6, 7, 1, 9, 1]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 6] and batch.max_seqlen == 4
    assert batch.rows.tolist() == [1, 2, 4] and batch.targets.tolist() == [7, 1, 1]
    assert batch.sample_ids.tolist() == [0, 0, 1]
    assert batch.kept_offsets.tolist() == [0, 2, 3, 3] and batch.kept_ids.tolist() == [7, 9, 1]
    assert batch.untruncated.tolist() == [False, False, True]
    assert batch.temperature.tolist() == [1.0, 1.0, 0.5]
    assert batch.policy_versions.tolist() == [3, 4, 4]
    assert batch.loss_weights.tolist() == [0.25, 0.25, 0.5]
    assert batch.delta.tolist() == [float("inf"), 0.5]
    assert batch.routed_experts is not None
    assert batch.routed_experts[:, 0, 0].tolist() == [6, 6, 6, -1, 5, -1]
    torch.testing.assert_close(batch.behavior_logprobs, torch.tensor([-0.1, -0.2, -0.3]))


@pytest.mark.parametrize(("betas", "needed"), [((0.0, 0.0), False), ((0.0, 0.1), True)])
def test_one_sample_with_a_beta_makes_its_batch_need_the_reference(betas, needed):
    samples = [
        replace(sample, objective=replace(OBJECTIVE, beta=beta))
        for sample, beta in zip(make_samples(0, num_groups=1), betas, strict=False)
    ]
    assert pack(MicroBatch(tuple(samples), (1.0,) * len(samples))).needs_reference is needed


def test_a_trajectory_of_two_segments_is_one_sample_with_separate_positions():
    rng = np.random.default_rng(0)
    segments = tuple(make_segment(rng, num_prompt=2, num_sampled=n, vocab=9) for n in (3, 1))
    batch = pack(MicroBatch((TrainSample(0, 0, "d", 1.0, OBJECTIVE, segments),), (0.25,)))
    assert batch.sample_ids.tolist() == [0, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 5, 8]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [16, 40, 1000])
@pytest.mark.parametrize("num_updates", [1, 2])
def test_every_sample_is_planned_once_and_no_micro_batch_is_too_long(num_ranks, max_tokens, num_updates):
    samples = make_samples(3, num_groups=5)
    updates = plan_updates(samples, num_updates=num_updates, num_ranks=num_ranks, max_tokens=max_tokens)
    planned = [(s.group_index, s.sample_index) for u in updates for rank in u.ranks for m in rank for s in m.samples]
    assert sorted(planned) == [(s.group_index, s.sample_index) for s in samples]
    for update in updates:
        assert len({len(rank) for rank in update.ranks}) == 1, "ranks must take part in the same number of collectives"
        assert all(m.num_tokens <= max_tokens for rank in update.ranks for m in rank)
    groups_of = [{s.group_index for rank in u.ranks for m in rank for s in m.samples} for u in updates]
    assert sum(len(groups) for groups in groups_of) == 5, "a group must not be split over updates"


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_loss_weights_make_the_sum_the_mean_over_the_update(aggregation):
    samples = make_samples(4, num_groups=4)
    (update,) = plan_updates(samples, num_ranks=2, max_tokens=30, aggregation=aggregation)
    values = {
        (s.group_index, s.sample_index): np.random.default_rng(s.sample_index).random(s.num_sampled) for s in samples
    }
    total = sum(
        weight * values[s.group_index, s.sample_index].sum()
        for rank in update.ranks
        for m in rank
        for s, weight in zip(m.samples, m.token_weights, strict=True)
    )
    expected = (
        np.mean([v.mean() for v in values.values()])
        if aggregation == "sequence"
        else np.concatenate(list(values.values())).mean()
    )
    assert total == pytest.approx(expected, rel=1e-12)


def test_a_sample_longer_than_a_micro_batch_is_an_error():
    with pytest.raises(ValueError, match="max_tokens_per_microbatch = 4"):
        plan_updates(make_samples(0, num_groups=1), max_tokens=4)


def test_an_empty_micro_batch_is_a_no_op_of_weight_zero():
    batch = pack(MicroBatch((), ()))
    assert batch.loss_weights.tolist() == [0.0] and len(batch.token_ids) == 2


def test_batches_survive_the_way_to_disk(tmp_path):
    (update,) = plan_updates(make_samples(5, routes=(2, 2, 8)), max_tokens=1000)
    batch = pack(update.ranks[0][0])
    torch.save(batch.to_dict(), tmp_path / "b.pt")
    again = type(batch)(**torch.load(tmp_path / "b.pt", weights_only=True))
    for name, value in batch.to_dict().items():
        other = getattr(again, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
