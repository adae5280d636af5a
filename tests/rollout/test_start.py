"""How an engine's process starts, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny_models import make_qwen3

START = """
import sys
from rollout.config import RolloutConfig
from rollout.engine import Engine

engine = Engine(sys.argv[1], RolloutConfig(), max_model_len=64, record_kept=True, record_routing=False)
engine.shutdown()
"""


def test_the_model_is_looked_at_in_the_engines_own_process(tmp_path: Path) -> None:
    """vLLM keeps what another process has told it about a model in its cache: here there is nothing to keep."""
    environment = {**os.environ, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    command = [sys.executable, "-c", START, str(make_qwen3(tmp_path / "model"))]
    subprocess.run(command, env=environment, check=True, cwd=Path(__file__).parents[2], timeout=120)
    assert not list(tmp_path.glob("cache/modelinfos/*"))
