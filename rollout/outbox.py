"""Results on their way from a thread to callers in event loops: one wake-up per loop for all that are ready.

To wake a loop takes a system call, and the loop's thread then takes the interpreter from the one that woke it. Where
hundreds of results come at once, that costs as much as everything else that is done for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class Reply(Generic[_T]):
    """What a caller waits for. To be made in the caller's event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[_T] = self.loop.create_future()

    def __await__(self) -> Generator[Any, None, _T]:
        return self.future.__await__()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits any more."""
        return self.future.cancelled()


_Entry = tuple[Reply[Any], Any, BaseException | None]
"""A reply, and the result or the exception that it is to get."""


class Outbox:
    """Belongs to one thread. What is put in reaches its caller with the next `send`."""

    def __init__(self) -> None:
        self._ready: list[_Entry] = []

    def resolve(self, reply: Reply[_T], result: _T) -> None:
        """The caller gets this result, unless it has gone."""
        self._ready.append((reply, result, None))

    def reject(self, reply: Reply[Any], error: BaseException) -> None:
        """The caller gets this exception raised, unless it has gone."""
        if isinstance(error, StopIteration):  # which no future takes
            error = RuntimeError(f"StopIteration: {error}")
        self._ready.append((reply, None, error))

    def send(self) -> None:
        """Hands over what is ready; what was meant for a closed loop is dropped."""
        ready, self._ready = self._ready, []
        by_loop: dict[asyncio.AbstractEventLoop, list[_Entry]] = {}
        for entry in ready:
            by_loop.setdefault(entry[0].loop, []).append(entry)
        for loop, entries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_settle, entries)
            except RuntimeError:
                if not loop.is_closed():
                    raise


def _settle(entries: list[_Entry]) -> None:
    for reply, result, error in entries:
        if reply.future.done():
            continue
        if error is None:
            reply.future.set_result(result)
        else:
            reply.future.set_exception(error)
