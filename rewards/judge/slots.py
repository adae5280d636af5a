"""A limit on requests under way that holds over all processes of a machine.

Reward functions run in several processes that know nothing of each other, so a counter in one of them limits nothing.
Each slot is a locked file; the kernel frees the locks of a process that dies.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

_POLL_S = 0.02
"""A few per cent of the fastest judge's reply; of all callers in a process one polls, the first in line."""


class Slots:
    """At most `count` holders of `name` at any time on this machine. Belongs to one event loop."""

    def __init__(self, name: str, count: int) -> None:
        """Holders who ask for different counts share the lower slots, so that the largest count is the limit."""
        self._folder = Path(tempfile.gettempdir()) / f"keel-judge-{os.getuid()}" / _digest(name)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._count = count
        self._here = asyncio.Semaphore(count)
        self._first_in_line = asyncio.Lock()

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Waits for a free slot and keeps it for the block."""
        async with self._here:
            async with self._first_in_line:
                slot = await self._acquire()
            try:
                yield
            finally:
                fcntl.flock(slot, fcntl.LOCK_UN)  # also where a forked child still holds the file open
                os.close(slot)

    async def _acquire(self) -> int:
        while True:
            for number in random.sample(range(self._count), self._count):
                slot = _try_lock(self._folder / str(number))
                if slot is not None:
                    return slot
            await asyncio.sleep(_POLL_S * random.uniform(0.5, 1.5))


def _try_lock(path: Path) -> int | None:
    """A locked file descriptor, or None where somebody else holds the lock."""
    slot = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(slot)
        return None
    return slot


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]
