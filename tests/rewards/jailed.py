"""Programs in the jail, for the tests of the sandbox."""

from __future__ import annotations

import shutil
import textwrap
import time
from pathlib import Path

from rewards.sandbox import run as sandbox
from rewards.sandbox.run import PYTHON, Command, Isolation, Limits, Outcome

WORKING = [isolation for isolation, refusal in sandbox.isolation_report().items() if not refusal]
"""Every kind of isolation that this machine allows."""
CLOSED = [isolation for isolation in WORKING if isolation is not Isolation.LIMITS]
"""Those that hide files."""
REACHABLE = shutil.which("python3", path="/usr/bin") or PYTHON
"""An interpreter that every user can reach: without namespaces, root's own may be none, and then cannot fork."""
FAST = Limits(seconds=5.0, memory_bytes=128 << 20, processes=16, output_bytes=1 << 16)


def python(source: str, isolation: Isolation, limits: Limits = FAST, *, stdin: str = "") -> Outcome:
    """One Python program, run on its own."""
    command = Command((REACHABLE, "-I", "-S", "-E", "-c", textwrap.dedent(source)), stdin, limits)
    return sandbox.run({}, [command], isolation=isolation)[0]


def processes_with(mark: str) -> list[str]:
    """Ids of the processes with `mark` on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "cmdline").read_text():
                found.append(entry.name)
        except OSError:  # it ended meanwhile
            continue
    return found


def assert_none_left(mark: str) -> None:
    """Waits a moment for the kernel to clear up."""
    deadline = time.monotonic() + 5
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes_with(mark)
