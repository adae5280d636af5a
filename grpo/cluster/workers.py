"""The pool of rollout workers: spreads requests, and replaces a worker that dies without losing or doubling a
sample."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError

from grpo.cluster.actors import RolloutActor
from grpo.cluster.placement import Placement
from grpo.cluster.waits import ClusterError, wait_for
from grpo.config import ClusterConfig
from rollout.types import Completion, GenerateRequest
from rollout.worker import RolloutWorker


@dataclass(slots=True, eq=False)
class Slot:
    """The place of one rollout worker; its actor changes when it is replaced."""

    number: int
    actor: Any
    num_outstanding: int = 0
    """Completions it owes."""
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while it may be given work: it lives and holds the learner's weights."""

    @property
    def name(self) -> str:
        return f"rollout worker {self.number}"


class RolloutPool:
    """All rollout workers of a run."""

    def __init__(
        self,
        placement: Placement,
        limits: ClusterConfig,
        *,
        worker_class: type[RolloutWorker],
        worker_kwargs: dict[str, Any],
        refresh: Callable[[Slot], Awaitable[None]],
    ) -> None:
        """`refresh` gives a replaced worker the learner's weights; until then it gets no work."""
        self._placement, self._limits = placement, limits
        self._worker_class, self._worker_kwargs, self._refresh = worker_class, worker_kwargs, refresh
        self.slots = [Slot(number, self._start(number)) for number in range(placement.num_workers)]
        self.num_restarts = 0
        self._replacements: dict[Slot, asyncio.Task[None]] = {}

    async def wait_until_up(self) -> None:
        """Returns when every worker answers for the first time; they are ready for work."""
        await asyncio.gather(*(self._wait_up(slot) for slot in self.slots))
        for slot in self.slots:
            slot.ready.set()

    @property
    def ready_slots(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.ready.is_set()]

    async def generate(self, request: GenerateRequest, what: str) -> tuple[Completion, ...]:
        """Draws a request on the least busy worker; if that worker dies, again from the start on another one.

        The seeds are in the request, so the second drawing stands for the first; only what came back is ever seen.
        """
        while True:
            slot = min(self.ready_slots, key=lambda s: s.num_outstanding, default=None)
            if slot is None:
                await self._any_replacement()
                continue
            try:
                return await self.generate_on(slot, request, what)
            except RayActorError:
                self.replace(slot)

    def generate_on(self, slot: Slot, request: GenerateRequest, what: str) -> asyncio.Task[tuple[Completion, ...]]:
        """Draws a request on one worker, which is asked at once, not when the result is awaited.

        The result raises RayActorError if the worker died.
        """
        actor, num_asked = slot.actor, len(request.seeds)
        light_ref, record_ref = actor.generate.remote(request)
        answer = asyncio.create_task(self._answer(slot.name, light_ref, record_ref, what))
        slot.num_outstanding += num_asked

        def settle(_: asyncio.Task[Any]) -> None:
            if slot.actor is actor:
                slot.num_outstanding -= num_asked

        answer.add_done_callback(settle)
        return answer

    async def _answer(self, worker: str, light_ref: Any, record_ref: Any, what: str) -> tuple[Completion, ...]:
        limit = self._limits.generate_timeout_s
        light = await wait_for(light_ref, limit, worker, f"generate {what}", "generate_timeout_s")
        return light.open(record_ref)

    async def on_each(self, slots: Sequence[Slot], call: Callable[[Slot], Awaitable[Any]], what: str) -> list[Slot]:
        """Makes one call on each worker and returns those that lived through it; the others are being replaced."""
        limit = self._limits.sync_timeout_s
        waits = [wait_for(call(slot), limit, slot.name, what, "sync_timeout_s") for slot in slots]
        results = await asyncio.gather(*waits, return_exceptions=True)
        alive = []
        for slot, result in zip(slots, results, strict=True):
            if isinstance(result, RayActorError):
                self.replace(slot)
            elif isinstance(result, BaseException):
                raise result
            else:
                alive.append(slot)
        return alive

    def replace(self, slot: Slot) -> None:
        """Starts putting a new worker in the place of a dead one, once."""
        if slot in self._replacements and not self._replacements[slot].done():
            return
        slot.ready.clear()
        self._replacements[slot] = asyncio.create_task(self._put_new_worker(slot), name=f"replace {slot.name}")

    def close(self) -> None:
        """Ends every worker."""
        for task in self._replacements.values():
            task.cancel()
        for slot in self.slots:
            ray.kill(slot.actor)

    async def _put_new_worker(self, slot: Slot) -> None:
        self.num_restarts += 1
        if self.num_restarts > self._limits.max_worker_restarts:
            raise ClusterError(
                f"{slot.name} died and cluster.max_worker_restarts = {self._limits.max_worker_restarts} is used up: "
                "look for its last words in the Ray logs (out of memory is the usual reason)"
            )
        slot.actor, slot.num_outstanding = self._start(slot.number), 0
        await self._wait_up(slot)
        await self._refresh(slot)
        slot.ready.set()

    async def _any_replacement(self) -> None:
        """Waits until some replaced worker is ready; a replacement that failed fails the run."""
        done, _ = await asyncio.wait(self._replacements.values(), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def _wait_up(self, slot: Slot) -> int:
        return await wait_for(
            slot.actor.pid.remote(), self._limits.start_timeout_s, slot.name, "come up", "start_timeout_s"
        )

    def _start(self, number: int) -> Any:
        options = {**self._placement.worker(number), "max_concurrency": 1000}
        return ray.remote(RolloutActor).options(**options).remote(self._worker_class, self._worker_kwargs)
