"""Results on their way from a thread to callers in event loops: one wake-up per loop for all that are ready.

To wake a loop takes a system call, and the loop's thread then takes the interpreter from the one that woke it. Where
hundreds of results come at once, that costs as much as everything else that is done for them.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

_T = TypeVar("_T")
_Entry = tuple[asyncio.Future[Any], Any, BaseException | None]
"""What a caller waits for, and the result or the exception that it is to get."""


class Outbox:
    """Belongs to one thread. What is put in reaches the future's caller, in its loop, with the next `send`."""

    def __init__(self) -> None:
        self._ready: list[_Entry] = []

    def resolve(self, future: asyncio.Future[_T], result: _T) -> None:
        """The caller gets this result, unless it has gone."""
        self._ready.append((future, result, None))

    def reject(self, future: asyncio.Future[Any], error: BaseException) -> None:
        """The caller gets this exception raised, unless it has gone."""
        if isinstance(error, StopIteration):  # which no future takes
            error = RuntimeError(f"StopIteration: {error}")
        self._ready.append((future, None, error))

    def send(self) -> None:
        """Hands over what is ready; what was meant for a closed loop is dropped."""
        ready, self._ready = self._ready, []
        by_loop: dict[asyncio.AbstractEventLoop, list[_Entry]] = {}
        for entry in ready:
            by_loop.setdefault(entry[0].get_loop(), []).append(entry)
        for loop, entries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_settle, entries)
            except RuntimeError:
                if not loop.is_closed():
                    raise


def _settle(entries: list[_Entry]) -> None:
    for future, result, error in entries:
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
