"""What a reward function sees and what scoring returns."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rollout.types import FinishReason, Group, Task


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion as a reward function sees it."""

    text: str
    """The decoded completion, special tokens left out."""
    num_tokens: int
    finish_reason: FinishReason


class RewardFn(Protocol):
    """A plain function, sync or async: `reward(task, answer, **kwargs) -> float`, or a mapping of named parts that sum
    to it."""

    def __call__(
        self, task: Task, answer: Answer, **kwargs: Any
    ) -> float | Mapping[str, float] | Awaitable[float | Mapping[str, float]]: ...


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with its rewards; `breakdown` keeps every reward function's share, by name."""

    group: Group
    answers: tuple[Answer, ...]
    rewards: np.ndarray  # float64 [G], weighted sum; NaN where not valid
    valid: np.ndarray  # bool [G]; False = the sample is dropped, never scored 0
    breakdown: Mapping[str, np.ndarray]  # name -> float64 [G], before weighting
    failures: Mapping[str, int]
    """Dropped samples by cause, for example `{"my_reward: ValueError": 2}`."""
