"""A Ray head of its own process, so that many short runs, or tests, share one start-up."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple, TextIO

_START_TIMEOUT_S = 60.0
_HEALTH_TIMEOUT_S = 15.0
_POLL_S = 0.2
_OBJECT_STORE_BYTES = 256 << 20
_SHOWN_CHARS = 2000
"""Of what a head printed that did not start."""


class RayHead(NamedTuple):
    """Where a head answers."""

    address: str
    """For `ray.init`, `HOST:PORT`."""
    dashboard: str
    """URL of its dashboard, where jobs are submitted; nothing answers there unless it was asked for."""


@contextmanager
def ray_head(num_cpus: int, *, dashboard: bool = False) -> Iterator[RayHead]:
    """A running Ray head; all of it ends with the block.

    Ray's token authentication stays on: the head and the runs of this process share a token through the environment.

    Raises:
        RuntimeError: the head ended, or did not answer in time; with the end of what it printed.
    """
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    port, dashboard_port, agent_port = _free_ports(3)
    address = f"127.0.0.1:{port}"
    command = [*_ray("start"), "--head", "--block", f"--num-cpus={num_cpus}", "--node-ip-address=127.0.0.1"]
    command += [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    # The agent's own default is a port that any process may have been given, another head or `port` above among them.
    command += [f"--port={port}", f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={agent_port}"]
    command += [f"--include-dashboard={str(dashboard).lower()}"]
    with tempfile.TemporaryFile("w+") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_until(lambda: _listens(port), head, log)
            _wait_until(lambda: _is_healthy(address), head, log)
            if dashboard:  # comes up after the rest
                _wait_until(lambda: _listens(dashboard_port), head, log)
            yield RayHead(address, f"http://127.0.0.1:{dashboard_port}")
        finally:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def _ray(verb: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", verb]


def _wait_until(is_up: Callable[[], bool], head: subprocess.Popen[bytes], log: TextIO) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not is_up():
        ended = head.poll() is not None
        if ended or time.monotonic() > deadline:
            log.seek(0)
            what = f"ended with exit code {head.returncode}" if ended else f"is not up after {_START_TIMEOUT_S:g} s"
            raise RuntimeError(f"the Ray head {what}: {log.read()[-_SHOWN_CHARS:]}")
        time.sleep(_POLL_S)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _is_healthy(address: str) -> bool:
    command = [*_ray("health-check"), "--address", address]
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=_HEALTH_TIMEOUT_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _free_ports(count: int) -> list[int]:
    """Different ports of this machine that nobody listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
