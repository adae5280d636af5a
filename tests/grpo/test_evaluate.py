"""Held-out accuracy over a scripted generator: greedy, pass@k, and per domain."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from grpo.evaluate import evaluate
from grpo.sampling import DrawnGroup
from rewards.types import Answer, ScoredGroup
from rollout.types import FinishReason, Group, Task

OUTCOMES = {"a0": [1, 0, 0, 0], "a1": [1, 1, 1, 1], "b0": [0, 0, 0, 0], "b1": [0, 1, float("nan"), 1]}
TASKS = [Task(task_id, task_id[0], "p") for task_id in OUTCOMES]


class ScriptedSampler:
    """Answers every task with scripted outcomes and remembers how it was asked."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    async def draw(self, index: int, task: Task, *, num_samples: int, seed: int, greedy: bool = False) -> DrawnGroup:
        self.calls.append({"index": index, "seed": seed, "greedy": greedy})
        outcome = np.array(OUTCOMES[task.id][:num_samples], float)
        valid = np.isfinite(outcome)
        scored = ScoredGroup(
            group=Group(index, task, np.zeros(1, np.int32), ()),
            answers=tuple(Answer("", 3, FinishReason.STOP) for _ in outcome),
            rewards=outcome * 2,
            valid=valid,
            breakdown={"outcome": outcome, "style": np.ones(len(outcome))},
            failures={},
        )
        return DrawnGroup(scored, 0.0, 0.0)


def run(num_samples: int) -> tuple[dict[str, float], ScriptedSampler]:
    sampler = ScriptedSampler()
    metrics = asyncio.run(evaluate(sampler, TASKS, num_samples=num_samples, seed=7))  # type: ignore[arg-type]
    return metrics, sampler


def test_pass_at_1_and_pass_at_k():
    metrics, sampler = run(4)
    assert metrics["eval/accuracy"] == pytest.approx((1 / 4 + 1 + 0 + 2 / 3) / 4)
    assert metrics["eval/pass_at_k"] == pytest.approx(3 / 4)
    assert metrics["eval/accuracy/a"] == pytest.approx(5 / 8) and metrics["eval/pass_at_k/b"] == pytest.approx(1 / 2)
    assert metrics["eval/response_length"] == 3
    assert all(not call["greedy"] for call in sampler.calls)
    assert all(call["seed"] != 7 for call in sampler.calls), "evaluation must not draw the training seeds"


def test_one_sample_is_greedy_and_has_no_pass_at_k():
    metrics, sampler = run(1)
    assert metrics["eval/accuracy"] == pytest.approx(2 / 4) and "eval/pass_at_k" not in metrics
    assert all(call["greedy"] for call in sampler.calls)
