"""The whole loop on GPUs: engines and ranks in pairs, each pair's weights crossing on its own GPU, and apart, with an
engine over two GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config import load_config
from grpo.records.metrics import read_metrics
from grpo.train import train
from tests.tiny_models import make_qwen3_moe
from tests.toy import write_run, write_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
pytest.importorskip("vllm")

TOGETHER, APART = {"layout": "colocated"}, {"layout": "disaggregated"}


@pytest.mark.parametrize(
    ("num_gpus", "cluster", "ranks", "rollout"),
    [
        (1, TOGETHER, 1, {"sleep_while_training": True}),
        (2, TOGETHER, 2, {"workers": 2}),
        (3, APART, 1, {"tensor_parallel_size": 2}),
        (4, APART, 2, {"tensor_parallel_size": 2}),
    ],
)
def test_weights_reach_every_engine(
    num_gpus: int, cluster: dict[str, Any], ranks: int, rollout: dict[str, Any], tmp_path: Path
) -> None:
    """The weights move so far in a step that the parity probe would stop the run at an engine left behind."""
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} CUDA devices")
    model = make_qwen3_moe(tmp_path / "model", dtype=torch.bfloat16)
    write_tokenizer(model)
    engines = {"dtype": "bfloat16", "gpu_memory_fraction": 0.3, "kv_cache_gib": 1.0, "enforce_eager": True, **rollout}
    learner = {"dtype": "bfloat16", "ranks": ranks}
    limits = {"max_parity_error": 0.05}
    run_file = write_run(tmp_path, model, cluster=cluster, learner=learner, rollout=engines, stability=limits)
    rows = read_metrics(train(load_config(run_file), run_file=run_file))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert row["rollout/worker_restarts"] == 0
        assert row["mismatch/mean_abs"] < 0.05 and row["mismatch/route_agreement"] > 0.9
    assert rows[-1]["train/kl"] > 0.2, "the weights have hardly moved"
