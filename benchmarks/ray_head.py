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
from contextlib import contextmanager

_START_TIMEOUT_S = 60.0
_OBJECT_STORE_BYTES = 256 << 20


@contextmanager
def ray_head(num_cpus: int, *, dashboard_port: int | None = None) -> Iterator[str]:
    """The address of a running Ray head, with a dashboard if it is given a port; all of it ends with the block.

    Ray's token authentication stays on: the head and the runs of this process share a token through the environment.

    Raises:
        RuntimeError: the head ended, or did not answer in time.
    """
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    address = f"127.0.0.1:{free_port()}"
    command = [*_ray("start"), "--head", "--block", f"--num-cpus={num_cpus}", "--node-ip-address=127.0.0.1"]
    command += [f"--port={address.rpartition(':')[2]}", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
    command += ["--disable-usage-stats", f"--include-dashboard={str(dashboard_port is not None).lower()}"]
    if dashboard_port is not None:  # jobs go through an agent, whose port would be that of every other head here
        command += [f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={free_port()}"]
    with tempfile.TemporaryFile("w+") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_until_healthy(address, head)
            if dashboard_port is not None:
                _wait_for_dashboard(dashboard_port)
            yield address
        finally:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def _ray(verb: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", verb]


def _wait_until_healthy(address: str, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while subprocess.run([*_ray("health-check"), "--address", address], capture_output=True, check=False).returncode:
        if head.poll() is not None:
            raise RuntimeError(f"the Ray head ended with exit code {head.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the Ray head at {address} does not answer after {_START_TIMEOUT_S:g} s")


def _wait_for_dashboard(port: int) -> None:
    """Comes up after the rest of the head."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no dashboard at port {port} after {_START_TIMEOUT_S:g} s") from None
            time.sleep(0.2)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
