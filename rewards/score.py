"""Groups in, scored groups out: every reward function on every completion, gated, weighted and summed.

A reward that fails does not become a zero, which would teach the policy that a right answer was wrong: its sample is
marked invalid, counted by cause, and dropped from its group. Where the functions run is the runner's business.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from rewards.load import LoadedReward, RewardSpec
from rewards.outcome import Outcome
from rewards.types import Answer, ScoredGroup
from rollout.types import Group, Task

logger = logging.getLogger(__name__)

_CALL_OPEN, _CALL_CLOSE = "<tool_call>", "</tool_call>"


class RewardRunner(Protocol):
    """Calls a reward function on the answers of one task; one outcome per answer, in their order."""

    async def run_reward(self, spec: RewardSpec, task: Task, answers: Sequence[Answer]) -> Sequence[Outcome]: ...


class Scorer:
    """All rewards of a run.

    Reads groups, returns scored groups; waits for the reward functions only.
    """

    def __init__(
        self,
        rewards_by_domain: Callable[[str], tuple[LoadedReward, ...]],
        *,
        decode: Callable[[Sequence[np.ndarray]], Sequence[str]],
        runner: RewardRunner,
    ) -> None:
        """
        Args:
            rewards_by_domain: the rewards of a task's domain.
            decode: completions of int32 [T] token ids -> their texts, special tokens left out; called in a thread
                of its own, for several groups at a time.
        """
        self._rewards_by_domain = rewards_by_domain
        self._decode = decode
        self._runner = runner
        self._logged: set[str] = set()

    async def score(self, group: Group) -> ScoredGroup:
        """Scores the G completions of a group, all functions at once."""
        specs = [reward.spec for reward in self._rewards_by_domain(group.task.domain)]
        answers = await self._answers(group)
        columns = await asyncio.gather(*(self._runner.run_reward(spec, group.task, answers) for spec in specs))
        failures = self._count_failures(specs, columns, group.task)
        totals = total_rewards(specs, columns)
        return ScoredGroup(group, answers, totals, np.isfinite(totals), breakdown(specs, columns), failures)

    async def _answers(self, group: Group) -> tuple[Answer, ...]:
        completions = group.completions
        texts = await asyncio.to_thread(self._decode, [completion.token_ids for completion in completions])
        return tuple(
            make_answer(group.task, text, completion.num_tokens, completion.finish_reason)
            for text, completion in zip(texts, completions, strict=True)
        )

    def _count_failures(
        self, specs: Sequence[RewardSpec], columns: Sequence[Sequence[Outcome]], task: Task
    ) -> dict[str, int]:
        causes: Counter[str] = Counter()
        for spec, column in zip(specs, columns, strict=True):
            for outcome in column:
                if not outcome.ok:
                    cause = f"{spec.name}: {outcome.cause}"
                    causes[cause] += 1
                    self._log_once(cause, task, outcome)
        return dict(causes)

    def _log_once(self, cause: str, task: Task, outcome: Outcome) -> None:
        if cause not in self._logged:
            self._logged.add(cause)
            detail = f"\n{outcome.detail}" if outcome.detail else ""
            logger.warning(
                "reward %s on task %s: the sample is dropped (logged once per cause)%s", cause, task.id, detail
            )


def make_answer(task: Task, text: str, num_tokens: int, finish_reason: Any) -> Answer:
    """The completion as rewards see it; a chat task's comes with its conversation and tool calls."""
    if isinstance(task.prompt, str):
        return Answer(text, num_tokens, finish_reason)
    messages = (*task.prompt, {"role": "assistant", "content": text})
    return Answer(text, num_tokens, finish_reason, messages, _tool_calls(text))


def total_rewards(specs: Sequence[RewardSpec], columns: Sequence[Sequence[Outcome]]) -> np.ndarray:
    """float64 [G]: the weighted sum; 0 where a gate is below 1; NaN where any function failed.

    Args:
        columns: per reward function the outcomes of the G samples.
    """
    values = np.array([[outcome.value if outcome.ok else math.nan for outcome in column] for column in columns])
    weights = np.array([spec.config.weight for spec in specs])
    is_gate = np.array([spec.config.gate for spec in specs])
    shut = (values[is_gate] < 1.0).any(axis=0) & np.isfinite(values).all(axis=0)
    return np.where(shut, 0.0, weights @ values)


def breakdown(specs: Sequence[RewardSpec], columns: Sequence[Sequence[Outcome]]) -> dict[str, np.ndarray]:
    """Unweighted values by reward name, and by `name/part` for rewards that name parts: float64 [G], NaN where
    absent."""
    table: dict[str, np.ndarray] = {}
    for spec, column in zip(specs, columns, strict=True):
        table[spec.name] = np.array([outcome.value for outcome in column], np.float64)
        for sample, outcome in enumerate(column):
            for part, value in outcome.parts.items():
                name = f"{spec.name}/{part}"
                if name not in table:
                    table[name] = np.full(len(column), np.nan)
                table[name][sample] = value
    return table


def _tool_calls(text: str) -> tuple[Mapping[str, Any], ...]:
    calls = []
    for block in _call_blocks(text):
        try:
            call = json.loads(block)
        except (ValueError, RecursionError):  # brackets nested a thousand deep
            continue
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            calls.append({"name": call["name"], "arguments": call.get("arguments", {})})
    return tuple(calls)


def _call_blocks(text: str) -> Iterator[str]:
    """From each opening to the next closing; in time proportional to the text, whatever a policy repeats."""
    end = 0
    while (start := text.find(_CALL_OPEN, end)) >= 0 and (close := text.find(_CALL_CLOSE, start)) >= 0:
        yield text[start + len(_CALL_OPEN) : close]
        end = close + len(_CALL_CLOSE)
