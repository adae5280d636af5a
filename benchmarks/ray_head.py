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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple, TextIO

_START_TIMEOUT_S = 60.0
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
            _wait_for_port(port, head, log)
            _wait_until_healthy(address)
            if dashboard:  # comes up after the rest
                _wait_for_port(dashboard_port, head, log)
            yield RayHead(address, f"http://127.0.0.1:{dashboard_port}")
        finally:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def _ray(verb: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", verb]


def _wait_for_port(port: int, head: subprocess.Popen[bytes], log: TextIO) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        if head.poll() is not None:
            log.seek(0)
            raise RuntimeError(f"the Ray head ended with exit code {head.returncode}: {log.read()[-_SHOWN_CHARS:]}")
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"nothing of the Ray head answers at port {port} after {_START_TIMEOUT_S:g} s"
                ) from None
            time.sleep(0.2)


def _wait_until_healthy(address: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while subprocess.run([*_ray("health-check"), "--address", address], capture_output=True, check=False).returncode:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the Ray head at {address} is not healthy after {_START_TIMEOUT_S:g} s")


def _free_ports(count: int) -> list[int]:
    """Different ports of this machine that nobody listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
