"""Runs a command that must not outlive whoever started it: `python -m grpo.judge_guard COMMAND...`.

Standard input is a pipe that the parent holds open and never writes to. When it closes, because the parent closed it or
is dead, the command's whole process group is ended: a terminate, a grace period, a kill. Exits with the command's code.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

GRACE_S = 10.0
"""How long a server may take to shut down before it is killed."""
_POLL_S = 0.2


def guard(command: Sequence[str]) -> int:
    """Runs `command` in a session of its own until it ends or standard input closes; returns its exit code."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None:
            if select.select([sys.stdin], [], [], _POLL_S)[0] and not os.read(sys.stdin.fileno(), 1):
                break
    finally:
        _end_group(process)
    return process.wait()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the command and all that it started, also where the command itself is gone already."""
    _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_S / 4)
    _signal_group(process.pid, signal.SIGKILL)


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:  # everything in it has ended
        return


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)  # through the `finally` above


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    sys.exit(guard(sys.argv[1:]))
