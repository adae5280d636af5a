"""What a reward function sees and returns, and what scoring returns.

A reward function is plain, sync or async, and is told apart by its second parameter's name:

    def per_sample(task: Task, answer: Answer, **kwargs) -> float | Mapping[str, float] | RewardResult
    def per_group(task: Task, answers: Sequence[Answer], **kwargs) -> Sequence[the same, or an Abstain]
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
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
    messages: tuple[Mapping[str, Any], ...] = ()
    """The conversation of a chat task, the completion last; empty for a plain text prompt."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """`{"name": ..., "arguments": ...}` of each well-formed `<tool_call>` block in a chat completion, in order."""


@dataclass(frozen=True, slots=True)
class RewardResult:
    """A reward with parts that explain it without having to sum to it.

    Example: `RewardResult(0.75, {"clarity": 3, "accuracy": 4})`. A plain mapping is the short form whose parts sum to
    the reward.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


class Abstain(Exception):
    """Raised by a reward that cannot judge: the sample is dropped and counted, never scored 0.

    A reward that judges a whole group may return one in a sample's place.
    """


Score = float | Mapping[str, float] | RewardResult


class RewardFn(Protocol):
    """A reward for one completion."""

    def __call__(self, task: Task, answer: Answer, **kwargs: Any) -> Score | Awaitable[Score]: ...


class GroupRewardFn(Protocol):
    """A reward for all completions of a prompt at once."""

    def __call__(
        self, task: Task, answers: Sequence[Answer], **kwargs: Any
    ) -> Sequence[Score | Abstain] | Awaitable[Sequence[Score | Abstain]]: ...


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with its rewards; `breakdown` keeps every reward function's share, by name."""

    group: Group
    answers: tuple[Answer, ...]
    rewards: np.ndarray  # float64 [G], weighted sum, 0 where a gate is shut; NaN where not valid
    valid: np.ndarray  # bool [G]; False = the sample is dropped, never scored 0
    breakdown: Mapping[str, np.ndarray]  # name -> float64 [G], before weighting and gates
    failures: Mapping[str, int]
    """Rewards that could not be had, by cause, for example `{"my_reward: ValueError": 2}`."""
