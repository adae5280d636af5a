"""Two FSDP2 ranks over NCCL, each on a GPU of its own, against one process: the same loss and gradients within bfloat16
rounding, with fused layers, flash attention and grouped experts on both sides."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from grpo.batch import Update, pack, plan_updates
from grpo.config import LearnerConfig
from grpo.learner import Learner, LearnerSpec, load_models
from grpo.policy.outline import from_outline, take_outline
from tests.moe_models import build_model
from tests.samples import make_samples

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

WIDE: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
MODELS: dict[str, dict[str, Any]] = {"qwen3": WIDE, "qwen3_moe": {**WIDE, "moe_intermediate_size": 96}}


class Trained(NamedTuple):
    """What one rank, or the only one, has to show after an update."""

    loss: float
    grad_norm: float
    gradients: dict[str, np.ndarray]


def train_on(model: Path, meeting: Path, update: Update, rank: int, world_size: int) -> Trained:
    """One update in a process that sees one GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
    if world_size > 1:
        torch.distributed.init_process_group(
            "nccl", init_method=f"file://{meeting}", rank=rank, world_size=world_size, device_id=torch.device("cuda", 0)
        )
    config = LearnerConfig(lr=1e-3, dtype="bfloat16", gradient_checkpointing=False)
    spec = LearnerSpec(str(model), config, True, True, "bfloat16", total_updates=1)
    loaded = load_models(spec)
    if rank > 0:  # as in a run: the weights come from rank 0
        loaded = from_outline(take_outline(loaded))
    learner = Learner(spec, rank=rank, world_size=world_size, loaded=loaded)
    result = learner.train([[pack(microbatch) for microbatch in update.ranks[rank]]])
    gradients: dict[str, Any] = {name: p.grad for name, p in learner.policy.module.named_parameters()}
    whole = {name: _full(gradient) for name, gradient in gradients.items() if gradient is not None}
    if world_size > 1:
        torch.distributed.destroy_process_group()
    return Trained(result.losses[0], result.grad_norms[0], whole)


def _full(gradient: Any) -> np.ndarray:
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).cpu().numpy()


def run(model: Path, meeting: Path, num_ranks: int, routes: tuple[int, int, int] | None) -> list[Trained]:
    """The same samples on some ranks, in several micro-batches each."""
    samples = make_samples(3, num_groups=4, vocab=98, routes=routes, max_sampled=60)
    (update,) = plan_updates(samples, num_ranks=num_ranks, max_tokens=200)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_ranks, context, max_tasks_per_child=1) as pool:
        calls = [pool.submit(train_on, model, meeting, update, rank, num_ranks) for rank in range(num_ranks)]
        return [call.result(timeout=120) for call in calls]


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_equal_one_process(name: str, tmp_path: Path) -> None:
    build_model(name, **MODELS[name]).save_pretrained(tmp_path / "model")
    routes = (3, 4, 16) if name == "qwen3_moe" else None
    (alone,) = run(tmp_path / "model", tmp_path / "alone", 1, routes)
    ranks = run(tmp_path / "model", tmp_path / "ranks", 2, routes)
    assert sum(rank.loss for rank in ranks) == pytest.approx(alone.loss, abs=2e-3)
    for rank in ranks:
        assert rank.grad_norm == pytest.approx(alone.grad_norm, rel=0.01)
        assert rank.gradients.keys() == alone.gradients.keys()
        for key, gradient in rank.gradients.items():
            expected = alone.gradients[key]
            assert expected.any(), key
            assert np.linalg.norm(gradient - expected) <= 0.02 * np.linalg.norm(expected), key
