"""Copies to the GPU and statistics off it, made beside what it computes: they wait for what they need, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from grpo.batch import TrainBatch, pack, plan_updates
from grpo.config import LearnerConfig
from grpo.learner import Learner, LearnerSpec, StepResult
from grpo.loss import LossInputs, LossOutput, grpo_loss
from tests.moe_models import build_model
from tests.samples import make_samples

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROUTES = (3, 4, 16)
LAG_CYCLES = 200_000_000
"""About a tenth of a second."""


class WaitingLearner(Learner):
    """Does one thing after the other."""

    def _to_device(self, batch: TrainBatch) -> TrainBatch:
        torch.cuda.synchronize()
        return batch.to(self.device)

    def _record_beside(self, *arguments) -> None:
        torch.cuda.synchronize()
        super()._record_beside(*arguments)


def lagging_loss(inputs: LossInputs) -> LossOutput:
    """The GPU is far behind when the next micro-batch is packed and the last one recorded."""
    torch.cuda._sleep(LAG_CYCLES)
    return grpo_loss(inputs)


def train(kind: type[Learner], model: Path, updates: Sequence[Sequence[TrainBatch]]) -> StepResult:
    config = LearnerConfig(lr=1e-4, dtype="bfloat16", gradient_checkpointing=False)
    learner = kind(LearnerSpec(str(model), config, True, True, "bfloat16", total_updates=1))
    return learner.train(updates, lagging_loss)


def test_a_learner_ahead_of_its_gpu_reports_what_one_that_waits_does(tmp_path: Path) -> None:
    build_model("qwen3_moe", hidden_size=256, head_dim=64, moe_intermediate_size=96).save_pretrained(tmp_path)
    samples = make_samples(3, num_groups=6, vocab=98, routes=ROUTES, max_sampled=60)
    (update,) = plan_updates(samples, max_tokens=100)
    batches = [pack(microbatch) for microbatch in update.ranks[0]]
    assert len(batches) > 4
    ahead, waiting = (train(kind, tmp_path, [batches]) for kind in (Learner, WaitingLearner))
    assert ahead.losses == pytest.approx(waiting.losses, rel=1e-4)
    assert ahead.stats.moments.keys() == waiting.stats.moments.keys()
    for name, moments in waiting.stats.moments.items():
        got = ahead.stats.moments[name]
        assert got.count == moments.count, name
        assert got.total == pytest.approx(moments.total, rel=1e-4, abs=1e-6), name
        assert got.maximum == pytest.approx(moments.maximum, rel=1e-4, abs=1e-6), name
    moved = abs(ahead.stats.mismatch_bins - waiting.stats.mismatch_bins).sum()
    assert moved <= 0.01 * waiting.stats.mismatch_bins.sum()
