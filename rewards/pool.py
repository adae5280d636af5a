"""A bounded pool of reward workers behind the one call that scoring makes.

Knows workers by their interface: `rewards.runner.RewardWorker` in this process, or the same behind Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rewards.load import RewardSpec
from rewards.outcome import Outcome
from rewards.runner import Job
from rewards.types import Answer
from rollout.types import Task

SPREAD_ABOVE_S = 0.005
"""A synchronous function whose calls take longer is spread over the workers answer by answer; for quicker ones a
message per worker would cost more than it saves."""
_NEWEST_SHARE = 0.2
"""Weight of the newest call in the running mean of a function's time."""


class Worker(Protocol):
    """Makes calls somewhere else."""

    async def start(self) -> None: ...

    async def run(self, job: Job) -> list[Outcome]: ...

    async def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Seat:
    worker: Worker
    num_outstanding: int = 0
    """Answers it owes."""


class RewardPool:
    """Gives jobs to the least busy worker."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._seats = [_Seat(worker) for worker in workers]
        self._seconds: dict[str, float] = {}

    async def start(self) -> None:
        """Starts every worker.

        Raises:
            RewardError: a worker cannot load the functions.
        """
        await asyncio.gather(*(seat.worker.start() for seat in self._seats))

    async def run_reward(
        self, spec: RewardSpec, task: Task, answers: Sequence[Answer], *, check: bool = False
    ) -> list[Outcome]:
        """One outcome per answer, in their order.

        Raises:
            RewardError: a worker cannot load its functions any more.
        """
        key = spec.key
        parts = self._split(spec, self._seconds.get(key, 0.0), tuple(answers))
        done = await asyncio.gather(*(self._run_on_one(Job(key, task, part, check)) for part in parts))
        outcomes = [outcome for part in done for outcome in part]
        for outcome in outcomes:
            before = self._seconds.get(key, outcome.seconds)
            self._seconds[key] = before + _NEWEST_SHARE * (outcome.seconds - before)
        return outcomes

    async def close(self) -> None:
        """Ends every worker."""
        await asyncio.gather(*(seat.worker.close() for seat in self._seats))

    def _split(self, spec: RewardSpec, seconds: float, answers: tuple[Answer, ...]) -> list[tuple[Answer, ...]]:
        if spec.per_group or spec.is_async or seconds <= SPREAD_ABOVE_S or len(self._seats) == 1:
            return [answers]
        return [(answer,) for answer in answers]

    async def _run_on_one(self, job: Job) -> list[Outcome]:
        seat = min(self._seats, key=lambda seat: seat.num_outstanding)
        seat.num_outstanding += len(job.answers)
        try:
            return await seat.worker.run(job)
        finally:
            seat.num_outstanding -= len(job.answers)
