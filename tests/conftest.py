"""Fixtures that several rooms share: one Ray cluster in its own process, one toy model."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray's token authentication stays on; the head, the drivers and their subprocesses of this session share one token.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def pytest_runtest_setup() -> None:
    """Where engines start, spares what is alive, mostly modules, the next searches for garbage: a start makes six, and
    they would take five times as long as all else it does. An engine's end gives everything back to the collector."""
    if "vllm" in sys.modules:
        gc.freeze()


def pytest_sessionfinish() -> None:
    """Frees what was spared while the interpreter is whole; nanobind would else report it as leaked."""
    gc.unfreeze()
    gc.collect()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def ray_head(folder: Path, *arguments: str) -> Iterator[str]:
    """The address of a Ray cluster in a process of its own; more logical cores than the machine has."""
    address = f"127.0.0.1:{free_port()}"
    log = (folder / "head.log").open("w")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=8"]
    command += ["--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}", *arguments]
    command += ["--disable-usage-stats", f"--object-store-memory={256 << 20}"]
    head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for_ray(address, head)
        yield address
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


@pytest.fixture(scope="session")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running Ray cluster that runs join by address."""
    with ray_head(tmp_path_factory.mktemp("ray"), "--include-dashboard=false") as address:
        yield address


def _wait_for_ray(address: str, head: subprocess.Popen[bytes]) -> None:
    import ray

    deadline = time.monotonic() + 60
    while True:
        assert head.poll() is None, "the Ray head ended"
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError):
            assert time.monotonic() < deadline, "the Ray head does not answer"
            time.sleep(0.5)
        else:
            ray.shutdown()
            return


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny MoE with a character tokenizer."""
    from tests.toy import write_model

    return write_model(tmp_path_factory.mktemp("toy") / "model")
