"""The group-mean baseline, and what is dropped instead of trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from grpo.advantage import Objective, assign_advantages
from rewards.types import Answer, ScoredGroup
from rollout.types import Completion, FinishReason, Group, KeptSets, Replay, Task

OBJECTIVES = {
    "math": Objective(beta=0.0, delta=None, eps_low=0.2, eps_high=0.3, temperature=1.0),
    "code": Objective(beta=0.1, delta=0.7, eps_low=0.1, eps_high=0.1, temperature=0.7),
}


def completion(token_ids: list[int], record_error: str = "") -> Completion:
    count = len(token_ids)
    return Completion(
        token_ids=np.array(token_ids, np.int32),
        behavior_logprobs=np.full(count, -0.5, np.float32),
        policy_versions=np.arange(count, dtype=np.int32),
        finish_reason=FinishReason.STOP,
        seed=0,
        replay=Replay(None, None),
        record_error=record_error,
    )


def scored_group(rewards: list[float], *, index: int = 0, domain: str = "math", errors: dict[int, str] | None = None):
    completions = tuple(completion([7, 1 + i], (errors or {}).get(i, "")) for i in range(len(rewards)))
    values = np.array(rewards)
    return ScoredGroup(
        group=Group(index, Task("t", domain, "p"), np.array([5, 6], np.int32), completions),
        answers=tuple(Answer("", 2, FinishReason.STOP) for _ in completions),
        rewards=values,
        valid=np.isfinite(values),
        breakdown={},
        failures={},
    )


def test_advantage_is_reward_minus_group_mean_without_deviation():
    result = assign_advantages([scored_group([1.0, 0.0, 0.0, 3.0])], OBJECTIVES.__getitem__)
    assert [sample.advantage for sample in result.samples] == [0.0, -1.0, -1.0, 2.0]
    assert [sample.sample_index for sample in result.samples] == [0, 1, 2, 3]


def test_invalid_and_corrupt_samples_leave_their_group_and_its_mean():
    group = scored_group([1.0, float("nan"), 0.0, 5.0], errors={3: "a sampled token lies outside its kept set"})
    result = assign_advantages([group], OBJECTIVES.__getitem__)
    assert [(s.sample_index, s.advantage) for s in result.samples] == [(0, 0.5), (2, -0.5)]
    assert result.num_dropped_samples == 2


def test_groups_without_signal_are_dropped_and_counted():
    groups = [
        scored_group([1.0, 1.0], index=0),
        scored_group([1.0, float("nan")], index=1),
        scored_group([0.0, 1.0], index=2),
    ]
    result = assign_advantages(groups, OBJECTIVES.__getitem__)
    assert result.num_zero_signal == 2
    assert {sample.group_index for sample in result.samples} == {2}


def test_each_sample_carries_its_domains_objective_and_its_tokens_exactly():
    groups = [scored_group([0.0, 1.0], domain="code"), scored_group([0.0, 1.0], index=1)]
    result = assign_advantages(groups, OBJECTIVES.__getitem__)
    assert [s.objective for s in result.samples] == [OBJECTIVES["code"]] * 2 + [OBJECTIVES["math"]] * 2
    (segment,) = result.samples[1].segments
    assert segment.token_ids.tolist() == [5, 6, 7, 2]
    assert segment.loss_mask.tolist() == [False, False, True, True]
    assert segment.policy_versions.tolist() == [-1, -1, 0, 1]
    np.testing.assert_allclose(segment.behavior_logprobs, [0, 0, -0.5, -0.5])


KEPT = KeptSets(np.array([0, 2, 3]), np.array([4, 7, 1], np.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"token_ids": np.array([7, 2], np.int32)}, "outside its kept set"),
        ({"behavior_logprobs": np.array([0.0, np.nan], np.float32)}, "not finite"),
        ({"replay": Replay(KEPT, np.zeros((3, 2, 2), np.uint8))}, "3 rows of routes"),
        ({"replay": Replay(KeptSets(np.array([0, 2]), np.array([4, 7], np.int32)), None)}, "1 kept sets"),
        (
            {
                "token_ids": np.array([], np.int32),
                "behavior_logprobs": np.array([], np.float32),
                "policy_versions": np.array([], np.int32),
            },
            "no token",
        ),
    ],
)
def test_corrupt_records_are_found(change: dict, message: str):
    sound = replace(completion([7, 1]), replay=Replay(KEPT, np.zeros((4, 2, 2), np.uint8)))
    error = replace(sound, **change).find_record_error(num_prompt_tokens=3)
    assert message in error if message else error == ""
