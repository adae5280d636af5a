"""Peak resident memory of a stretch of code, or of whole processes, on Linux."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_RESET_PEAK = "5"  # see proc(5), clear_refs
_POLL_S = 0.2


@dataclass(slots=True)
class Stage:
    """What a stretch of code took."""

    seconds: float = 0.0
    peak_bytes: int = 0
    """Highest resident set above the one at its start."""


@contextmanager
def measured() -> Iterator[Stage]:
    """Times the block and takes its peak memory; the result is filled in at its end."""
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    stage, before, started = Stage(), _status_bytes("self", "VmRSS"), time.perf_counter()
    yield stage
    stage.seconds = time.perf_counter() - started
    stage.peak_bytes = _status_bytes("self", "VmHWM") - before


@contextmanager
def peak_of_children(*names: str) -> Iterator[dict[str, int]]:
    """Highest resident bytes, by name, of descendant processes whose command line holds that name."""
    peaks, done = dict.fromkeys(names, 0), threading.Event()

    def watch() -> None:
        while not done.wait(_POLL_S):
            for process in psutil.Process().children(recursive=True):
                try:
                    command = " ".join(process.cmdline())
                    peak = _status_bytes(str(process.pid), "VmHWM")
                except (psutil.Error, OSError, StopIteration):  # it ended meanwhile
                    continue
                for name in names:
                    if name in command:
                        peaks[name] = max(peaks[name], peak)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()


def anonymous_bytes() -> int:
    """Resident bytes of this process that no file holds."""
    return _status_bytes("self", "RssAnon")


def _status_bytes(pid: str, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
