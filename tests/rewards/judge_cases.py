"""Tasks, answers and settings that the tests of the judge share."""

from __future__ import annotations

import asyncio
from typing import Any

from rewards.judge.settings import Access, Sampling
from rewards.rubric_judge import rubric_judge
from rewards.types import Answer, RewardResult
from rollout.types import FinishReason, Task

CRITERIA: list[dict[str, Any]] = [
    {"id": "accuracy", "text": "Every statement is true.", "weight": 3, "scale": [0, 10]},
    {"id": "clarity", "text": "A child understands it."},
]
RUBRIC = {"criteria": CRITERIA, "reference": "The moon pulls at the sea."}
TASK = Task("tides-1", "writing", "Explain tides.", fields={"rubric": RUBRIC})
FAST = Access(backoff_s=0.001, timeout_s=5.0, cache="")
"""No cache, and no time lost between attempts."""


def answer(text: str = "The moon does it.", **more: Any) -> Answer:
    return Answer(text, 5, FinishReason.STOP, **more)


def judge(
    url: str,
    given: Answer | None = None,
    *,
    task: Task = TASK,
    model: str = "m",
    sampling: Sampling | None = None,
    access: Access = FAST,
) -> RewardResult:
    """One call of the reward in an event loop of its own."""
    call = rubric_judge(
        task, given or answer(), endpoint=url, model=model, sampling=sampling or Sampling(), access=access
    )
    return asyncio.run(call)
