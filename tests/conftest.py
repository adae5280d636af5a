"""Fixtures that several rooms share: one Ray cluster in its own process, one toy model."""

from __future__ import annotations

import gc
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.ray_head import ray_head

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


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A running Ray cluster that runs join by address; more logical cores than the machine has."""
    with ray_head(num_cpus=8) as head:
        yield head.address


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny MoE with a character tokenizer."""
    from tests.toy import write_model

    return write_model(tmp_path_factory.mktemp("toy") / "model")
