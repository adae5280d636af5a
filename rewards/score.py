"""Groups in, scored groups out: every reward function on every completion, weighted and summed.

A reward that fails does not become a zero, which would teach the policy that a right answer was wrong: its sample is
marked invalid, counted by cause, and dropped from its group. Synchronous functions run in threads, so that a slow one
does not hold up generation; they must be safe to call from several threads at once.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from rewards.load import LoadedReward
from rewards.types import Answer, ScoredGroup
from rollout.types import Completion, Group, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Score:
    """What one reward function said of one sample: its total, and its parts if it named any."""

    value: float
    parts: Mapping[str, float]


class Scorer:
    """All rewards of a run.

    Reads groups, returns scored groups; waits for the reward functions only.
    """

    def __init__(
        self, rewards_by_domain: Callable[[str], tuple[LoadedReward, ...]], *, decode: Callable[[np.ndarray], str]
    ) -> None:
        """
        Args:
            rewards_by_domain: the rewards of a task's domain.
            decode: int32 [T] token ids -> text, special tokens left out.
        """
        self._rewards_by_domain = rewards_by_domain
        self._decode = decode
        self._logged: set[str] = set()

    async def score(self, group: Group) -> ScoredGroup:
        """Scores the G completions of a group, all functions and samples at once."""
        rewards = self._rewards_by_domain(group.task.domain)
        answers = tuple(self._answer(completion) for completion in group.completions)
        calls = [self._call(reward, group.task, answer) for answer in answers for reward in rewards]
        results = await asyncio.gather(*calls)
        rows = [results[i : i + len(rewards)] for i in range(0, len(results), len(rewards))]
        failures = Counter(result for row in rows for result in row if isinstance(result, str))
        totals = np.array([_total(rewards, row) for row in rows], np.float64)
        return ScoredGroup(group, answers, totals, np.isfinite(totals), _breakdown(rewards, rows), dict(failures))

    def _answer(self, completion: Completion) -> Answer:
        return Answer(self._decode(completion.token_ids), completion.num_tokens, completion.finish_reason)

    async def _call(self, reward: LoadedReward, task: Task, answer: Answer) -> _Score | str:
        """The score, or the cause why there is none."""
        try:
            if inspect.iscoroutinefunction(reward.fn):
                result = await reward.fn(task, answer, **reward.kwargs)
            else:
                result = await asyncio.to_thread(reward.fn, task, answer, **reward.kwargs)
                result = await result if inspect.isawaitable(result) else result
            return _read(result)
        except Exception as error:  # a user's function may fail in any way: that sample is dropped and counted
            cause = (
                f"{reward.name}: {error}" if isinstance(error, _BadResult) else f"{reward.name}: {type(error).__name__}"
            )
            self._log_once(cause, task, error)
            return cause

    def _log_once(self, cause: str, task: Task, error: Exception) -> None:
        if cause not in self._logged:
            self._logged.add(cause)
            trace = None if isinstance(error, _BadResult) else error
            logger.warning(
                "reward %s on task %s: the sample is dropped (logged once per cause)", cause, task.id, exc_info=trace
            )


class _BadResult(Exception):
    """A reward function returned something that is not a score."""


def _read(result: object) -> _Score:
    """Checks what a reward function returned."""
    if isinstance(result, Mapping):
        parts = {str(name): _number(value) for name, value in result.items()}
        return _Score(sum(parts.values()), parts)
    return _Score(_number(result), {})


def _number(value: object) -> float:
    if not isinstance(value, int | float | np.integer | np.floating | np.bool_):
        raise _BadResult(f"returned {type(value).__name__}, not a number")
    if not math.isfinite(value):
        raise _BadResult("returned a number that is not finite")
    return float(value)


def _total(rewards: tuple[LoadedReward, ...], row: list[_Score | str]) -> float:
    """The weighted sum, NaN where any function failed."""
    if any(isinstance(result, str) for result in row):
        return math.nan
    return sum(
        reward.weight * score.value for reward, score in zip(rewards, row, strict=True) if isinstance(score, _Score)
    )


def _breakdown(rewards: tuple[LoadedReward, ...], rows: list[list[_Score | str]]) -> dict[str, np.ndarray]:
    """Unweighted values by reward name, and by `name/part` for rewards that name parts: float64 [G], NaN where
    absent."""
    breakdown: dict[str, np.ndarray] = {}
    for column, reward in enumerate(rewards):
        for sample, row in enumerate(rows):
            result = row[column]
            values = (
                {} if isinstance(result, str) else {"": result.value, **{f"/{k}": v for k, v in result.parts.items()}}
            )
            breakdown.setdefault(reward.name, np.full(len(rows), np.nan))
            for suffix, value in values.items():
                breakdown.setdefault(reward.name + suffix, np.full(len(rows), np.nan))[sample] = value
    return breakdown
