"""Scoring a group: weights, gates, parts, and what becomes of failures."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo.drops import DropRateError, check_drops
from rewards.config import RewardConfig
from rewards.load import LoadedReward, RewardSpec
from rewards.outcome import Outcome
from rewards.score import Scorer, make_answer
from rewards.types import Answer, ScoredGroup
from rollout.types import Completion, FinishReason, Group, Replay, Task

Judge = Callable[[Answer], Outcome]


class Table:
    """A runner that looks outcomes up instead of starting a process."""

    def __init__(self, **judges: Judge) -> None:
        self.judges = judges

    async def run_reward(self, spec: RewardSpec, task: Task, answers: Sequence[Answer]) -> list[Outcome]:
        return [self.judges[spec.name](answer) for answer in answers]


def reward(name: str, weight: float = 1.0, **settings: Any) -> LoadedReward:
    config = RewardConfig(fn=f"any:{name}", weight=weight, **settings)
    return LoadedReward(RewardSpec(config, Path("/"), per_group=False, is_async=False), lambda: None, {})


def make_group(*token_ids: list[int], task: Task | None = None) -> Group:
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
    return Group(0, task or Task("t", "math", "?", "7"), np.array([1], np.int32), completions)


def decode(completions: Sequence[np.ndarray]) -> list[str]:
    return [" ".join(map(str, token_ids)) for token_ids in completions]


def score(group: Group, *rewards: LoadedReward, **judges: Judge) -> ScoredGroup:
    return asyncio.run(Scorer(lambda domain: rewards, decode=decode, runner=Table(**judges)).score(group))


def first_token(answer: Answer) -> Outcome:
    return Outcome(float(answer.text.split()[0]))


def length(answer: Answer) -> Outcome:
    return Outcome(float(answer.num_tokens), {"tokens": float(answer.num_tokens)} if answer.num_tokens > 1 else {})


def is_seven(answer: Answer) -> Outcome:
    return Outcome(float(answer.text.startswith("7")))


def fails_on_one(answer: Answer) -> Outcome:
    return Outcome(cause="KeyError", detail="a traceback") if answer.text == "1" else Outcome(1.0)


def test_weighted_sum() -> None:
    rewards = (reward("first", 2.0), reward("size", -0.5))
    scored = score(make_group([7], [5, 6], [2, 2, 2]), *rewards, first=first_token, size=length)
    np.testing.assert_array_equal(scored.rewards, [2 * 7 - 0.5, 2 * 5 - 1.0, 2 * 2 - 1.5])
    np.testing.assert_array_equal(scored.breakdown["first"], [7, 5, 2])
    np.testing.assert_array_equal(scored.breakdown["size"], [1, 2, 3])
    np.testing.assert_array_equal(scored.breakdown["size/tokens"], [np.nan, 2, 3])
    assert scored.valid.all() and scored.valid.dtype == bool and not scored.failures
    assert scored.answers[1] == Answer("5 6", 2, FinishReason.STOP)


def test_a_shut_gate_makes_the_total_zero_and_keeps_the_breakdown() -> None:
    rewards = (reward("size", 3.0), reward("gate", 0.0, gate=True))
    scored = score(make_group([7, 7], [5, 6]), *rewards, size=length, gate=is_seven)
    np.testing.assert_array_equal(scored.rewards, [6.0, 0.0])
    np.testing.assert_array_equal(scored.breakdown["size"], [2, 2])
    np.testing.assert_array_equal(scored.breakdown["gate"], [1, 0])
    assert scored.valid.all()


def test_a_gate_counts_with_its_weight_where_it_is_open() -> None:
    scored = score(make_group([7], [5]), reward("gate", 0.5, gate=True), gate=is_seven)
    np.testing.assert_array_equal(scored.rewards, [0.5, 0.0])


def test_every_gate_must_hold() -> None:
    rewards = (reward("one", gate=True), reward("two", gate=True))
    scored = score(
        make_group([7], [7, 1]), *rewards, one=is_seven, two=lambda a: Outcome(0.99 if a.num_tokens > 1 else 1)
    )
    np.testing.assert_array_equal(scored.rewards, [2.0, 0.0])


def test_a_failure_drops_its_sample_and_is_counted_even_behind_a_shut_gate() -> None:
    rewards = (reward("ok"), reward("bad"), reward("gate", gate=True))
    scored = score(make_group([0], [1], [1]), *rewards, ok=first_token, bad=fails_on_one, gate=lambda _: Outcome(0.0))
    assert scored.valid.tolist() == [True, False, False] and scored.rewards[0] == 0.0
    assert all(math.isnan(value) for value in scored.rewards[1:])
    assert scored.failures == {"bad: KeyError": 2}
    np.testing.assert_array_equal(scored.breakdown["ok"], [0, 1, 1])


def test_each_cause_is_logged_once_with_function_task_and_traceback(caplog: pytest.LogCaptureFixture) -> None:
    scorer = Scorer(lambda domain: (reward("bad"),), decode=decode, runner=Table(bad=fails_on_one))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            asyncio.run(scorer.score(make_group([1], [2])))
    assert len(caplog.records) == 1
    assert "bad: KeyError on task t" in caplog.text and "a traceback" in caplog.text


def test_long_completions_are_decoded_beside_everything_else() -> None:
    turns = threading.Barrier(2, timeout=10)

    def decode_both(completions: Sequence[np.ndarray]) -> list[str]:
        turns.wait()  # returns only if the other group is decoded at the same time
        return decode(completions)

    async def score_both() -> list[ScoredGroup]:
        scorer = Scorer(lambda domain: (reward("first"),), decode=decode_both, runner=Table(first=first_token))
        return await asyncio.gather(*(scorer.score(make_group([i], [i + 1])) for i in range(2)))

    assert [scored.rewards.tolist() for scored in asyncio.run(score_both())] == [[0.0, 1.0], [1.0, 2.0]]


def test_each_domain_has_its_own_rewards() -> None:
    of_domain = {"math": (reward("first"),), "code": (reward("size"), reward("gate"))}
    scorer = Scorer(
        lambda domain: of_domain[domain], decode=decode, runner=Table(first=first_token, size=length, gate=is_seven)
    )
    for domain in of_domain:
        scored = asyncio.run(scorer.score(make_group([1], task=Task("t", domain, "?"))))
        assert [name.partition("/")[0] for name in scored.breakdown] == [r.name for r in of_domain[domain]]


def test_a_chat_answer_carries_its_conversation_and_tool_calls() -> None:
    task = Task("t", "agent", ({"role": "user", "content": "add"},))
    text = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><tool_call>{"name": 3}</tool_call><tool_call>{'
    answer = make_answer(task, text, 9, FinishReason.STOP)
    assert answer.messages == (*task.prompt, {"role": "assistant", "content": text})
    assert answer.tool_calls == ({"name": "add", "arguments": {"a": 1}},)
    plain = make_answer(Task("t", "d", "?"), text, 9, FinishReason.STOP)
    assert plain.messages == plain.tool_calls == ()


def test_no_chat_answer_keeps_the_run_waiting_or_ends_it() -> None:
    task = Task("t", "agent", ({"role": "user", "content": "add"},))
    deep = f"<tool_call>{'[' * 100_000}</tool_call>"
    call = '<tool_call>{"name": "add"}</tool_call>'
    started = time.monotonic()
    answer = make_answer(task, f"{deep}{call}{'<tool_call>' * 30_000}", 9, FinishReason.STOP)
    assert time.monotonic() - started < 1
    assert answer.tool_calls == ({"name": "add", "arguments": {}},)


def dropped(num_valid: int, num_dropped: int, cause: str = "slow: timeout", task: str = "train:7") -> ScoredGroup:
    valid = np.arange(num_valid + num_dropped) < num_valid
    group = make_group(*([1] for _ in valid), task=Task(task, "math", "?"))
    failures = {cause: num_dropped} if num_dropped else {}
    return ScoredGroup(group, (), np.where(valid, 1.0, np.nan), valid, {}, failures)


def test_the_drop_rate_is_over_the_whole_step() -> None:
    check_drops([dropped(0, 4), dropped(4, 0)], 0.5)
    check_drops([dropped(4, 0)], 0.0)
    with pytest.raises(DropRateError, match=r"5 of the step's 8 samples, more than grpo\.max_drop_rate = 0\.5"):
        check_drops([dropped(0, 4), dropped(3, 1)], 0.5)


def test_a_step_without_any_reward_stops_the_run() -> None:
    with pytest.raises(DropRateError, match="4 of the step's 4 samples"):
        check_drops([dropped(0, 4)], 0.999)


def test_the_stop_names_functions_causes_and_tasks() -> None:
    groups = [dropped(0, 2), dropped(0, 1, "mine: KeyError", "train:9"), dropped(0, 1, task="train:8")]
    with pytest.raises(DropRateError) as error:
        check_drops(groups, 0.1)
    assert "slow: timeout: 3 times, for example task train:7" in str(error.value)
    assert "mine: KeyError: 1 times, for example task train:9" in str(error.value)
