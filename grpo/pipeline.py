"""Keeps generation ahead of training, but never by more than `max_off_policy_steps` policy versions.

Consumes: group indices 0, 1, 2, ... in order. Produces: drawn groups in that same order. Waits for: `draw`, which
generates and scores one group and is all this file knows of engines and rewards.

Why the bound holds: a step takes P groups or more, first in first out, and after a step took its groups at most k P are
left in flight (P = groups per step, k = `max_off_policy_steps`). A group drawn at version v is therefore taken at most
k steps, that is k versions, later. With k = 0 nothing is in flight while training runs: the synchronous mode.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PipelineState:
    """What a checkpoint keeps: the groups that were drawn, or half drawn, and not yet trained on are drawn again."""

    next_index: int
    pending: tuple[int, ...] = ()


class GroupPipeline(Generic[T]):
    """A first-in, first-out window of groups being drawn; T is what drawing one gives."""

    def __init__(
        self,
        draw: Callable[[int], Coroutine[Any, Any, T]],
        *,
        groups_per_step: int,
        max_off_policy_steps: int,
        state: PipelineState,
    ) -> None:
        self._draw = draw
        self._ahead = groups_per_step * max_off_policy_steps
        self._next_index = state.next_index
        self._redraw = deque(state.pending)
        self._in_flight: deque[tuple[int, asyncio.Task[T]]] = deque()

    @property
    def state(self) -> PipelineState:
        return PipelineState(self._next_index, (*(index for index, _ in self._in_flight), *self._redraw))

    def start(self, num_groups: int) -> None:
        """Begins to draw the next `num_groups` groups, as far as they are not under way."""
        self._fill(num_groups)

    async def take(
        self, num_groups: int, *, counts: Callable[[T], bool] | None = None, limit: int | None = None
    ) -> Sequence[T]:
        """The next `num_groups` groups in order; afterwards the window is filled again for the steps ahead.

        With `counts`, groups for which it is False come along uncounted, and more are drawn in their place until there
        are `limit` groups in all. Cancelled or failed, it takes nothing: every group stays pending.
        """
        size = num_groups
        while True:
            self._fill(size)
            groups = await asyncio.gather(*(task for _, task in itertools.islice(self._in_flight, size)))
            missing = 0 if counts is None else num_groups - sum(map(counts, groups))
            if missing <= 0 or limit is None or size >= limit:
                break
            size = min(limit, size + missing)
        for _ in range(size):
            self._in_flight.popleft()
        self._fill(self._ahead)
        return groups

    async def close(self) -> None:
        """Stops everything in flight; what was pending still counts as pending in `state`."""
        tasks = [task for _, task in self._in_flight]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _fill(self, size: int) -> None:
        while len(self._in_flight) < size:
            if self._redraw:
                index = self._redraw.popleft()
            else:
                index, self._next_index = self._next_index, self._next_index + 1
            self._in_flight.append((index, asyncio.create_task(self._draw(index), name=f"group {index}")))
