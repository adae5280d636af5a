"""An engine over two processes: what it draws and records, and weights that come in, are those of one model."""

from __future__ import annotations

import asyncio
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from rollout.config import RolloutConfig
from rollout.worker import RolloutWorker
from tests.rollout.engine_reference import compare, load_reference
from tests.rollout.test_engine_update import checkpoint, make_request, send
from tests.tiny_models import make_qwen3_moe, perturb


@pytest.mark.slow
def test_two_processes_equal_transformers(tmp_path: Path) -> None:
    """The second update goes straight to the tensors whose places the first has shown, in each process its part."""
    folder = make_qwen3_moe(tmp_path)
    model = load_reference(folder)
    config = RolloutConfig(dtype="float32", tensor_parallel_size=2)
    worker = RolloutWorker(str(folder), config, max_model_len=256, record_kept=True, record_routing=True)
    request = make_request(1)
    try:
        assert len(multiprocessing.active_children()) == 2
        for version in range(3):
            if version > 0:
                perturb(model, seed=version)
                asyncio.run(send(worker, checkpoint(model), version, max_bytes=50_000))
            (completion,) = asyncio.run(worker.generate(request))
            result = compare(model, request, completion)
            assert np.abs(result.logprob_diff).max() < 2e-5
            assert result.kept_agrees.all() and result.routes_agree.all()
            assert (completion.policy_versions == version).all()
    finally:
        asyncio.run(worker.shutdown())
    assert not multiprocessing.active_children()
