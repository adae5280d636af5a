"""Two FSDP2 ranks in Ray actors against one process: loss, every gradient, streamed weights and resume."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch.distributed.tensor import DTensor

from grpo.advantage import TrainSample
from grpo.batch import Update, pack, plan_updates
from grpo.cluster.actors import LearnerActor
from grpo.config import LearnerConfig
from grpo.learner import Learner, LearnerSpec
from rollout.weight_sync import unpack_bucket
from tests.samples import make_group, make_samples

NUM_RANKS = 2
ROUTES = (3, 2, 8)


class InspectableRank(LearnerActor):
    """A learner rank that shows its gradients and trains on records that are already there."""

    def train_on(self, update: Update, rank: int, share_prompts: bool = False) -> tuple[float, float]:
        batches = [pack(microbatch, share_prompts=share_prompts) for microbatch in update.ranks[rank]]
        result = self._learner.train([batches])
        return result.losses[0], result.grad_norms[0]

    def gradients(self) -> dict[str, np.ndarray]:
        gradients: dict[str, Any] = {n: p.grad for n, p in self._learner.policy.module.named_parameters()}
        return {name: grad.full_tensor().numpy() for name, grad in gradients.items() if grad is not None}

    def score_and_forget(self, update: Update, rank: int) -> bool:
        """Whether every parameter is the sharded float32 master after a forward without a backward."""
        self._learner.score([pack(microbatch) for microbatch in update.ranks[rank]])
        parameters = list(self._learner.policy.module.parameters())
        return all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in parameters)

    def weights(self, sends: bool) -> dict[str, np.ndarray]:
        buckets = self._learner.weight_buckets(1 << 16, sends=sends)
        return {name: tensor.numpy().copy() for bucket in buckets for name, tensor in unpack_bucket(bucket)}


def spec_for(model: Path, **changes: Any) -> LearnerSpec:
    settings = {"lr": 1e-3, "dtype": "float32", "gradient_checkpointing": True, "max_grad_norm": 0.05, **changes}
    return LearnerSpec(str(model), LearnerConfig(**settings), True, True, "float32", total_updates=10)


def plan(seed: int, num_ranks: int, max_tokens: int, *, share_prompts: bool = False) -> Update:
    samples: list[TrainSample] = make_samples(seed, num_groups=2, routes=ROUTES)
    samples += make_group(np.random.default_rng(seed), 2, num_prompt=20, num_sampled=[4, 9, 2, 6, 5], routes=ROUTES)
    (update,) = plan_updates(samples, num_ranks=num_ranks, max_tokens=max_tokens, share_prompts=share_prompts)
    return update


@pytest.fixture(scope="module")
def ranks(ray_address: str, toy_model: Path) -> Iterator[list[Any]]:
    ray.init(address=ray_address, log_to_driver=False, logging_level=logging.ERROR)
    actors = start_ranks(spec_for(toy_model))
    yield actors
    ray.shutdown()


def start_ranks(spec: LearnerSpec) -> list[Any]:
    actors = [ray.remote(InspectableRank).options(num_cpus=1).remote() for _ in range(NUM_RANKS)]
    actors[0].read_model.remote(spec)
    outline = actors[0].outline.remote()
    ray.get([actor.take_model.remote(outline) for actor in actors[1:]])
    address = ray.get(actors[0].free_address.remote())
    ray.get([actor.build.remote(spec, rank, NUM_RANKS, address) for rank, actor in enumerate(actors)])
    return actors


def test_two_ranks_equal_one_process(ranks, toy_model, tmp_path):
    alone = Learner(spec_for(toy_model))
    for seed, max_tokens, share in ((1, 1000, False), (2, 30, False), (3, 50, True)):
        result = alone.train([[pack(m) for m in plan(seed, 1, 1000).ranks[0]]])
        update = plan(seed, NUM_RANKS, max_tokens, share_prompts=share)
        parts = ray.get([actor.train_on.remote(update, rank, share) for rank, actor in enumerate(ranks)])
        assert sum(loss for loss, _ in parts) == pytest.approx(result.losses[0], abs=1e-6)
        assert [norm for _, norm in parts] == pytest.approx(list(result.grad_norms) * NUM_RANKS, rel=1e-5)
        assert result.grad_norms[0] > 0.05, "clipping must have had something to do"
        gradients = ray.get([actor.gradients.remote() for actor in ranks])[0]
        expected = {n: p.grad for n, p in alone.policy.module.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            np.testing.assert_allclose(gradient, expected[name].numpy(), atol=2e-6, rtol=1e-4, err_msg=name)

    sent = ray.get([actor.weights.remote(rank == 0) for rank, actor in enumerate(ranks)])
    own = {name: tensor for bucket in alone.weight_buckets(1 << 30) for name, tensor in unpack_bucket(bucket)}
    assert sent[0].keys() == own.keys() and sent[1] == {}, "rank 0 sends, the others take part"
    for name, tensor in own.items():
        # Adam divides by the root of the squared gradient: where that is tiny, rounding shows.
        np.testing.assert_allclose(sent[0][name], tensor.numpy(), atol=2e-4, err_msg=name)
    for both in ray.get([actor.weights.remote(True) for actor in ranks]):
        assert both.keys() == own.keys() and all(np.array_equal(both[name], sent[0][name]) for name in own)


def test_resumed_ranks_continue_bit_equal(ranks, toy_model, tmp_path):
    ray.get([actor.save.remote(tmp_path / "state") for actor in ranks])
    update = plan(5, NUM_RANKS, 30)
    first = ray.get([actor.train_on.remote(update, rank) for rank, actor in enumerate(ranks)])
    weights = ray.get([actor.weights.remote(True) for actor in ranks])[0]
    ray.get([actor.load.remote(tmp_path / "state") for actor in ranks])
    again = ray.get([actor.train_on.remote(update, rank) for rank, actor in enumerate(ranks)])
    assert first == again
    resumed = ray.get([actor.weights.remote(True) for actor in ranks])[0]
    assert all(np.array_equal(weights[name], resumed[name]) for name in weights)


@pytest.mark.slow
def test_half_precision_ranks_compute_in_bfloat16_and_keep_float32_masters(ray_address, ranks, toy_model):
    actors = start_ranks(spec_for(toy_model, dtype="bfloat16"))
    update = plan(1, NUM_RANKS, 1000)
    parts = ray.get([actor.train_on.remote(update, rank) for rank, actor in enumerate(actors)])
    gradients = ray.get([actor.gradients.remote() for actor in actors])[0]
    assert {g.dtype for g in gradients.values()} == {np.dtype(np.float32)}
    alone = Learner(spec_for(toy_model))
    result = alone.train([[pack(m) for m in plan(1, 1, 1000).ranks[0]]])
    loss = sum(part for part, _ in parts)
    assert loss != result.losses[0] and loss == pytest.approx(result.losses[0], abs=0.02)
    assert torch.isfinite(torch.tensor(parts)).all()
    assert ray.get([actor.score_and_forget.remote(update, rank) for rank, actor in enumerate(actors)]) == [True, True]
    for actor in actors:
        ray.kill(actor)
