"""Looks at an installation and says what would stop a run, each with its remedy: `keel doctor`.

The versions it wants are those of the distribution's own `cpu` and `gpu` extras, so they are written down once.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.table import Table

from grpo.config import ConfigError, load_config

MIN_MEMORY_GIB = 4.0
"""The quickstart's engine, learner and Ray take about this much."""
MIN_DISK_GIB = 5.0
"""A few checkpoints of a small model."""
MIN_SHARED_MEMORY_GIB = 1.0
"""Ray's object store lies in /dev/shm; below this it spills to disk."""
PLUGIN_GROUP = "vllm.general_plugins"

Verdict = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's findings."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


def run_doctor(
    run_file: Path | None = None, overrides: tuple[str, ...] = (), *, console: Console | None = None
) -> bool:
    """Prints all findings; False when something would stop a run."""
    checks = list(all_checks())
    if run_file is not None:
        checks.append(check_run_file(run_file, overrides))
    _print(checks, console or Console())
    return all(check.verdict != "problem" for check in checks)


def all_checks() -> Iterator[Check]:
    """Installation and machine."""
    yield Check("python", "ok", platform.python_version())
    on_gpu = find_gpus()
    yield on_gpu
    yield from check_pins("gpu" if on_gpu.verdict == "ok" else "cpu")
    yield check_plugin()
    yield check_cores()
    yield check_space("memory", psutil.virtual_memory().available, MIN_MEMORY_GIB, "close other programs")
    yield check_space(
        "disk here", shutil.disk_usage(".").free, MIN_DISK_GIB, "free some, or set run.output_dir elsewhere"
    )
    if Path("/dev/shm").exists():
        free, remedy = shutil.disk_usage("/dev/shm").free, "in a container, start it with --shm-size=8g"
        yield check_space("/dev/shm", free, MIN_SHARED_MEMORY_GIB, remedy, blocks=False)


def find_gpus() -> Check:
    """GPUs as the driver shows them; torch is not asked, since a CPU build would say that there are none."""
    driver = Path("/proc/driver/nvidia/gpus")
    num_gpus = len(list(driver.iterdir())) if driver.is_dir() else 0
    if num_gpus:
        return Check("GPUs", "ok", f"{num_gpus} NVIDIA")
    return Check("GPUs", "warning", "none", "fine for the quickstart; models of real size need one")


def check_pins(extra: str) -> Iterator[Check]:
    """Every pinned requirement of the distribution and of one of its extras."""
    try:
        requirements = [Requirement(text) for text in metadata.requires("keel") or []]
    except metadata.PackageNotFoundError:
        yield Check("keel", "problem", "not installed", "run `make install`, or `pip install -e .`")
        return
    for requirement in requirements:
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if wanted and requirement.specifier:
            yield check_pin(requirement, extra)


def check_pin(requirement: Requirement, extra: str) -> Check:
    """An installed version against what is asked for; a local label such as `+cpu` does not matter."""
    remedy = f"pip install '{requirement.name}{requirement.specifier}' (or `make install`)"
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, "problem", f"not installed (keel[{extra}] wants it)", remedy)
    if requirement.specifier.contains(Version(found).public, prereleases=True):
        return Check(requirement.name, "ok", found)
    return Check(requirement.name, "problem", f"{found}, want {requirement.specifier}", remedy)


def check_plugin() -> Check:
    """vLLM finds Keel's weight transfer, and on CPU its recording kernels, through this entry point."""
    names = [entry.name for entry in metadata.entry_points(group=PLUGIN_GROUP)]
    if "keel" not in names:
        return Check("vLLM plugin", "problem", f"no entry point keel in {PLUGIN_GROUP}", "reinstall: pip install -e .")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "keel" not in allowed.split(","):
        return Check("vLLM plugin", "problem", f"VLLM_PLUGINS={allowed} leaves it out", "unset it, or add keel to it")
    return Check("vLLM plugin", "ok", "registered")


def check_cores() -> Check:
    """The cores this process may use: a container or `taskset` may give fewer than the machine has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores >= 2:
        return Check("cores", "ok", str(cores))
    return Check("cores", "warning", "1", "an engine and a learner will share it: expect half the speed")


def check_space(name: str, free: float, needed_gib: float, remedy: str, *, blocks: bool = True) -> Check:
    free_gib = free / 2**30
    if free_gib >= needed_gib:
        return Check(name, "ok", f"{free_gib:,.1f} GiB free")
    return Check(name, "problem" if blocks else "warning", f"{free_gib:.2f} GiB free, want {needed_gib:g}", remedy)


def check_run_file(run_file: Path, overrides: tuple[str, ...]) -> Check:
    """The pre-flight checks of a run."""
    from grpo.preflight import check

    try:
        config = load_config(run_file, overrides)
        check(config, run_file)
    except ConfigError as error:
        return Check(str(run_file), "problem", str(error))
    return Check(str(run_file), "ok", f"{config.run.steps} steps, everything it names is there")


def _print(checks: list[Check], console: Console) -> None:
    marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}
    table = Table(box=None, show_header=False)
    for check in checks:
        table.add_row(marks[check.verdict], _plain(check.name), _plain(check.found), _plain(check.remedy))
    console.print(table)


def _plain(text: str) -> str:
    """Text that rich does not read as markup."""
    return re.sub(r"\[", r"\\[", text)
