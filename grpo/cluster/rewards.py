"""The reward pool on Ray: every reward worker is an actor, somewhere in the cluster, that owns one reward process.

The actor is the plain `RewardWorker`: a class of this package would make it import torch to pass messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from grpo.cluster.waits import ClusterError, wait_for
from grpo.config import ClusterConfig
from rewards.load import RewardError, RewardSpec
from rewards.outcome import Outcome
from rewards.runner import Job, RewardWorker

_MAX_CONCURRENT_JOBS = 1000
_CHECK_EVERY_S = 60.0
"""A job may wait long for its turn; this often its worker is asked whether it still lives."""


class RemoteRewardWorker:
    """A reward actor from the driver's side; a lost one is replaced and its jobs are run again."""

    def __init__(self, number: int, specs: Sequence[RewardSpec], limits: ClusterConfig) -> None:
        self._name, self._specs, self._limits = f"reward worker {number}", tuple(specs), limits
        self._num_restarts = 0
        self._replacement: asyncio.Task[None] | None = None
        self._actor = self._new_actor()

    async def start(self) -> None:
        """Returns when the reward functions are loaded there.

        Raises:
            ClusterError: it does not come up in time.
            RewardError: it cannot load them.
        """
        await self._wait(self._actor.start.remote(), "load the reward functions")

    async def run(self, job: Job) -> list[Outcome]:
        """One outcome per answer, in their order.

        Raises:
            ClusterError: the worker does not answer any more, or was lost too often.
            RewardError: it cannot load its functions any more.
        """
        while True:
            actor = self._actor
            try:
                return await self._watched(actor, job)
            except RayActorError:
                if actor is self._actor:
                    await self._replace()

    async def close(self) -> None:
        """As `kill`."""
        self.kill()

    def kill(self) -> None:
        """Ends the actor; its reward process ends with it."""
        ray.kill(self._actor)

    async def _watched(self, actor: Any, job: Job) -> list[Outcome]:
        call = asyncio.ensure_future(_as_coroutine(actor.run.remote(job)))
        try:
            while not (await asyncio.wait({call}, timeout=_CHECK_EVERY_S))[0]:
                await self._wait(actor.is_alive.remote(), "answer")
            return call.result()
        except RayTaskError as error:
            raise _own_error(error) from None
        finally:
            call.cancel()

    async def _wait(self, call: Any, what: str) -> None:
        try:
            await wait_for(call, self._limits.start_timeout_s, self._name, what, "start_timeout_s")
        except RayTaskError as error:
            raise _own_error(error) from None

    async def _replace(self) -> None:
        """Puts a new actor in the place of a lost one, once for all jobs that lost it."""
        if self._replacement is None or self._replacement.done():
            self._replacement = asyncio.create_task(self._put_new_actor(), name=f"replace {self._name}")
        await asyncio.shield(self._replacement)

    async def _put_new_actor(self) -> None:
        self._num_restarts += 1
        if self._num_restarts > self._limits.max_worker_restarts:
            raise ClusterError(
                f"{self._name} was lost and cluster.max_worker_restarts = {self._limits.max_worker_restarts} is used "
                "up: look for its last words in the Ray logs"
            )
        actor = self._new_actor()
        await self._wait(actor.start.remote(), "load the reward functions")
        self._actor = actor

    def _new_actor(self) -> Any:
        # No core is claimed: the actor only passes messages, and its reward process is bounded by being one process.
        options = {"num_cpus": 0, "max_concurrency": _MAX_CONCURRENT_JOBS, "scheduling_strategy": "SPREAD"}
        return ray.remote(RewardWorker).options(**options).remote(self._specs, cwd=Path.cwd())


def _own_error(error: RayTaskError) -> Exception:
    """The reward error inside Ray's, as it was raised over there."""
    return error.cause if isinstance(error.cause, RewardError) else error


async def _as_coroutine(call: Any) -> list[Outcome]:
    return await call
