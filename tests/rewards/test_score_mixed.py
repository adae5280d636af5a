"""Three domains in one batch: what the example's rewards say, and what a step's metrics say of each domain."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from grpo.advantage import AdvantageResult
from grpo.config import load_config
from grpo.records.step_metrics import rollout_metrics
from grpo.sampling import DrawnGroup
from rewards.load import load_rewards
from rewards.pool import RewardPool
from rewards.runner import RewardWorker
from rewards.score import breakdown, make_answer, total_rewards
from rewards.types import Answer, ScoredGroup
from rollout.tasks import load_tasks
from rollout.types import Completion, FinishReason, Group, Replay, Task

EXAMPLE = Path(__file__).parents[2] / "examples" / "mixed"


def test_each_domain_of_the_example_is_judged_by_its_own_rewards() -> None:
    config = load_config(EXAMPLE / "train.toml")
    tasks = {task.domain: task for task in load_tasks(config.tasks.train, config.tasks, base_dir=EXAMPLE)}
    assert set(tasks) == {"arithmetic", "code", "text"}
    wrong = {"arithmetic": "0", "code": "f=lambda a,b:0", "text": "no"}

    async def run() -> dict[str, tuple[list[float], list[str]]]:
        rewards = {name: load_rewards(config.rewards_of(name), base_dir=EXAMPLE) for name in tasks}
        specs = [reward.spec for of_domain in rewards.values() for reward in of_domain]
        pool = RewardPool([RewardWorker(specs)])
        await pool.start()
        try:
            said = {}
            for name, task in tasks.items():
                texts = (task.answer or "", wrong[name])
                answers = [make_answer(task, text, 1, FinishReason.STOP) for text in texts]
                own = [reward.spec for reward in rewards[name]]
                columns = [await pool.run_reward(spec, task, answers) for spec in own]
                assert all(outcome.ok for column in columns for outcome in column), columns
                said[name] = (total_rewards(own, columns).tolist(), sorted(breakdown(own, columns)))
            return said
        finally:
            await pool.close()

    said = asyncio.run(run())
    assert {name: totals for name, (totals, _) in said.items()} == {name: [1.0, 0.0] for name in tasks}
    assert said["arithmetic"][1] == ["exact_match"] and said["code"][1] == ["code_tests"]
    assert {"judged_by_rules/polite", "judged_by_rules/complete", "is_sentence"} <= set(said["text"][1])


def drawn(domain: str, rewards: list[float], parts: list[float], failures: dict[str, int]) -> DrawnGroup:
    completion = Completion(
        np.array([1], np.int32),
        np.zeros(1, np.float32),
        np.zeros(1, np.int32),
        FinishReason.STOP,
        seed=0,
        replay=Replay(None, None),
    )
    group = Group(0, Task("t", domain, "?"), np.array([1], np.int32), (completion,) * len(rewards))
    values = np.array(rewards)
    scored = ScoredGroup(
        group,
        (Answer("", 1, FinishReason.STOP),) * len(rewards),
        values,
        np.isfinite(values),
        {domain: values, f"{domain}/part": np.array(parts)},
        failures,
    )
    return DrawnGroup(scored, 0.0, 0.0)


def test_metrics_by_domain_with_drops_by_cause() -> None:
    nan = float("nan")
    groups = [
        drawn("code", [1.0, nan, 0.0], [nan, nan, 4.0], {"code_tests: timeout": 1}),
        drawn("text", [0.5, nan, nan], [1.0, 2.0, 2.0], {"judge: abstained": 2}),
        drawn("text", [1.0, 1.0, nan], [3.0, 5.0, 2.0], {"judge: abstained": 1}),
    ]
    metrics = rollout_metrics(groups, AdvantageResult((), 0, 4))
    assert metrics["train/dropped_samples"] == 4
    assert metrics["train/dropped_samples/code"] == 1 and metrics["train/dropped_samples/text"] == 3
    assert metrics["dropped/code_tests/timeout"] == 1 and metrics["dropped/judge/abstained"] == 3
    assert metrics["train/reward/code"] == 0.5
    assert metrics["train/reward/text"] == pytest.approx(2.5 / 3)
    assert metrics["reward/code/part"] == 4.0, "the mean is over the samples that have the part"
    assert metrics["reward/text/part/text"] == 3.0


def test_every_domain_setting_of_the_example_reaches_its_domain() -> None:
    config = load_config(EXAMPLE / "train.toml")
    assert [config.sampling_of(name).max_new_tokens for name in ("arithmetic", "code", "text")] == [4, 20, 32]
    assert [config.stability_of(name).beta for name in ("arithmetic", "code", "text")] == [0.005, 0.002, 0.005]
    assert config.stability_of("text").delta == 0.8 and config.stability_of("text").eps_high == 0.3
    assert [reward.gate for reward in config.rewards_of("text")] == [False, True]
