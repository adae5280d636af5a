"""One child process from the parent's side: started in a session of its own, listened to, killed with all it started.

Knows nothing of calls: events and the death are handed to the owner, output is drained and its last words are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from rewards.child import SLOT_BYTES
from rewards.load import RewardError, RewardSpec
from rewards.wire import Batch, Hello, encode

MAX_OUTPUT_BYTES = 8 << 20
"""A process that writes more than this between two calls' ends floods its output, and is killed."""
LAST_WORDS_BYTES = 2000
"""How much of the end of its output is kept."""
START_LIMIT_S = 120.0
"""Longest time for importing the functions."""
_MAX_LINE = 64 << 20
_DRAIN_LIMIT_S = 2.0
"""How long to wait for the last events of a dead process."""


class RewardProcess:
    """A child that has been started; `closed` is done when it is gone and everything it said has been read."""

    def __init__(
        self, specs: Sequence[RewardSpec], cwd: Path | None, on_event: Callable[[dict[str, Any]], None]
    ) -> None:
        self._on_event = on_event
        self.num_output_bytes = 0
        """Since the owner last set it to 0."""
        self.on_flood: Callable[[], None] = lambda: None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last_words = b""
        self._unsent: list[bytes] = []
        self._launch(specs, cwd)
        self.closed = asyncio.create_task(self._watch(), name=f"reward process {self.pid}")

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_status(self) -> int | None:
        """As `subprocess` gives it: negative for a signal; None while it runs."""
        return self._popen.returncode

    @property
    def last_words(self) -> str:
        return self._last_words.decode(errors="replace").strip()

    @property
    def running_async_call(self) -> int:
        """The asynchronous call whose code runs, or ran when the process died; 0 for none."""
        return int.from_bytes(self._slot[:], "little")

    async def wait_ready(self) -> None:
        """Returns when the functions are loaded.

        Raises:
            RewardError: they cannot be loaded, or the process died of it, or it took too long.
        """
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), START_LIMIT_S)
        except TimeoutError:
            self.kill()
            raise RewardError(
                f"rewards: importing the reward functions took longer than {START_LIMIT_S:g} s: do less when the "
                "module is imported"
            ) from None

    def send(self, batch: Batch) -> None:
        """Hands calls over, those of one turn of the event loop together; a process that is dying loses them, and its
        owner sends them to the next one."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(encode(batch))

    def _flush(self) -> None:
        self._writer.write(b"".join(self._unsent))
        self._unsent.clear()

    def kill(self) -> None:
        """Ends the process, its process group, and all that descends from it."""
        doomed: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            doomed = psutil.Process(self.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _launch(self, specs: Sequence[RewardSpec], cwd: Path | None) -> None:
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        with tempfile.TemporaryFile() as shared:
            shared.truncate(SLOT_BYTES)
            self._slot = mmap.mmap(shared.fileno(), SLOT_BYTES)
            handed_over = (theirs.fileno(), shared.fileno())
            code = "from rewards.child import main; main()"
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-c", code, *map(str, handed_over)],
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                pass_fds=handed_over,
                start_new_session=True,
                cwd=cwd if cwd is not None and cwd.is_dir() else None,
                env=_environment(),
            )
        theirs.close()
        os.close(write_end)
        self._hello = encode(Hello(tuple(specs)))
        self._socket, self._pipe = ours, read_end

    async def _watch(self) -> None:
        """Listens until the process has ended, then clears up after it."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        waiter = threading.Thread(target=_wait, args=(self._popen, loop, ended), daemon=True)
        waiter.start()
        reader, self._writer = await asyncio.open_connection(sock=self._socket, limit=_MAX_LINE)
        self._writer.write(self._hello)
        tasks = [asyncio.create_task(self._read_events(reader)), asyncio.create_task(self._drain_output())]
        try:
            await ended.wait()
            self.kill()  # what it started may outlive it
            await asyncio.wait(tasks, timeout=_DRAIN_LIMIT_S)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._writer.close()
            if not self._ready.done():
                self._ready.set_exception(RewardError(f"rewards: {self._why_not_ready()}"))
                self._ready.exception()  # the owner may never ask

    async def _read_events(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                event = json.loads(line)
                if event["event"] == "ready":
                    self._ready.set_result(None)
                elif event["event"] == "refused":
                    self._ready.set_exception(RewardError(event["message"]))
                else:
                    self._on_event(event)
        finally:
            self.kill()  # it closed its end or wrote nonsense to it: whatever it does now, nobody will hear of it

    async def _drain_output(self) -> None:
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(self._pipe, "rb", 0)
        )
        try:
            while piece := await reader.read(1 << 16):
                self._last_words = (self._last_words + piece)[-LAST_WORDS_BYTES:]
                self.num_output_bytes += len(piece)
                if self.num_output_bytes > MAX_OUTPUT_BYTES:
                    self.on_flood()
        finally:
            transport.close()

    def _why_not_ready(self) -> str:
        words = f"; its last words:\n{self.last_words}" if self.last_words else ""
        return f"the process that imports the reward functions {describe_exit(self.exit_status)}{words}"


def describe_exit(status: int | None) -> str:
    """`-11` -> `signal SIGSEGV`, `3` -> `exited with status 3`."""
    if status is None:
        return "stopped listening"
    return f"exited with status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"


def _wait(popen: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
    popen.wait()
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(ended.set)


def _environment() -> dict[str, str]:
    """This process's environment, with Keel importable and libraries kept from starting a thread per core."""
    root = str(Path(__file__).parents[1])
    path = os.environ.get("PYTHONPATH")
    paths = root if not path else f"{root}{os.pathsep}{path}"
    return {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONPATH": paths}
