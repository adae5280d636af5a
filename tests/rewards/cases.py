"""Tasks and answers for the tests of the shipped rewards."""

from __future__ import annotations

from typing import Any

from rewards.types import Answer
from rollout.types import FinishReason, Task


def task(answer: str | None = None, prompt: str = "?", **fields: Any) -> Task:
    """A task called `t` whose other columns are `fields`."""
    return Task("t", "test", prompt, answer, fields)


def said(text: str, num_tokens: int = 1, finish_reason: FinishReason = FinishReason.STOP) -> Answer:
    """A completion."""
    return Answer(text, num_tokens, finish_reason)
