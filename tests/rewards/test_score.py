"""Scoring a group: weights, parts, and what becomes of failures."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import numpy as np
import pytest

from rewards.load import LoadedReward
from rewards.score import Scorer
from rewards.types import Answer, ScoredGroup
from rollout.types import Completion, FinishReason, Group, Replay, Task


def make_group(*token_ids: list[int]) -> Group:
    completions = tuple(
        Completion(
            np.array(ids, np.int32),
            np.zeros(len(ids), np.float32),
            np.zeros(len(ids), np.int32),
            FinishReason.STOP,
            seed=0,
            replay=Replay(None, None),
        )
        for ids in token_ids
    )
    return Group(0, Task("t", "math", "?", "7"), np.array([1], np.int32), completions)


def decode(token_ids: np.ndarray) -> str:
    return " ".join(map(str, token_ids))


def score(group: Group, *rewards: LoadedReward) -> ScoredGroup:
    return asyncio.run(Scorer(lambda domain: rewards, decode=decode).score(group))


def first_token(task: Task, answer: Answer) -> float:
    return float(answer.text.split()[0])


async def length(task: Task, answer: Answer, *, scale: float) -> float:
    await asyncio.sleep(0)
    return scale * answer.num_tokens


def in_parts(task: Task, answer: Answer) -> dict[str, float]:
    return {"form": 0.25, "content": 1.0} if answer.num_tokens > 1 else {"form": 0.5}


def test_weighted_sum_of_sync_and_async_functions() -> None:
    rewards = (LoadedReward("first", 2.0, first_token, {}), LoadedReward("length", -0.5, length, {"scale": 3.0}))
    scored = score(make_group([7], [5, 6], [2, 2, 2]), *rewards)
    np.testing.assert_array_equal(scored.rewards, [2 * 7 - 1.5, 2 * 5 - 3.0, 2 * 2 - 4.5])
    np.testing.assert_array_equal(scored.breakdown["first"], [7, 5, 2])
    np.testing.assert_array_equal(scored.breakdown["length"], [3, 6, 9])
    assert scored.valid.all() and scored.valid.dtype == bool and not scored.failures
    assert scored.answers[1] == Answer("5 6", 2, FinishReason.STOP)


def test_named_parts_sum_to_the_reward() -> None:
    scored = score(make_group([1, 2], [3]), LoadedReward("mine", 1.0, in_parts, {}))
    np.testing.assert_array_equal(scored.rewards, [1.25, 0.5])
    np.testing.assert_array_equal(scored.breakdown["mine"], [1.25, 0.5])
    np.testing.assert_array_equal(scored.breakdown["mine/form"], [0.25, 0.5])
    np.testing.assert_array_equal(scored.breakdown["mine/content"], [1.0, np.nan])


def misbehave(task: Task, answer: Answer) -> Any:
    match answer.text:
        case "1":
            raise KeyError("x")
        case "2":
            return float("nan")
        case "3":
            return "0.5"
        case "4":
            return None
        case "5":
            return {"a": float("inf")}
    return True


def test_failures_are_dropped_and_counted_never_scored_zero() -> None:
    group = make_group([0], [1], [1], [2], [3], [4], [5])
    scored = score(group, LoadedReward("ok", 1.0, first_token, {}), LoadedReward("bad", 1.0, misbehave, {}))
    assert scored.valid.tolist() == [True] + [False] * 6
    assert scored.rewards[0] == 1.0 and np.isnan(scored.rewards[1:]).all()
    assert scored.failures == {
        "bad: KeyError": 2,
        "bad: returned a number that is not finite": 2,
        "bad: returned str, not a number": 1,
        "bad: returned NoneType, not a number": 1,
    }
    np.testing.assert_array_equal(scored.breakdown["ok"], [0, 1, 1, 2, 3, 4, 5])


def test_each_cause_is_logged_once_with_its_task(caplog: pytest.LogCaptureFixture) -> None:
    scorer = Scorer(lambda domain: (LoadedReward("bad", 1.0, misbehave, {}),), decode=decode)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            asyncio.run(scorer.score(make_group([1], [2])))
    assert len(caplog.records) == 2
    assert "bad: KeyError on task t" in caplog.text


def test_sync_functions_run_at_the_same_time() -> None:
    barrier = threading.Barrier(3, timeout=10)

    def wait_for_the_others(task: Task, answer: Answer) -> float:
        barrier.wait()
        return 1.0

    scored = score(make_group([1], [2], [3]), LoadedReward("wait", 1.0, wait_for_the_others, {}))
    assert scored.valid.all()


def test_each_domain_has_its_own_rewards() -> None:
    asked: list[str] = []

    def rewards_of(domain: str) -> tuple[LoadedReward, ...]:
        asked.append(domain)
        return (LoadedReward("first", 1.0, first_token, {}),)

    asyncio.run(Scorer(rewards_of, decode=decode).score(make_group([1])))
    assert asked == ["math"]
