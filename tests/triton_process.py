"""Half of a Triton test in a process of its own: TRITON_INTERPRET is read when triton is imported, never later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


def run_half(module: str, half: str, *, interpret: bool) -> Any:
    """The JSON on the last line that `python -m module half` prints; kernels are interpreted, or compiled for real."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, "-m", module, half]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Halves(NamedTuple):
    """What both halves of a test print."""

    interpreted: Any
    compiled: Any


def run_halves(module: str) -> Halves:
    """Its halves `interpret` and `compile_kernels`, side by side."""
    with ThreadPoolExecutor() as threads:
        interpreted = threads.submit(run_half, module, "interpret", interpret=True)
        compiled = threads.submit(run_half, module, "compile_kernels", interpret=False)
        return Halves(interpreted.result(), compiled.result())
