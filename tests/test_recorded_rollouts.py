"""From a real engine's record to the learner's log-probabilities: with replay they agree, without it they do not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo.advantage import Segment, TrainSample, completion_segment
from grpo.batch import MicroBatch, pack
from grpo.config import LearnerConfig
from grpo.learner import Learner, LearnerSpec
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.types import Completion, GenerateRequest
from tests.samples import OBJECTIVE
from tests.tiny_models import VOCAB_SIZE, make_qwen3_moe

Change = Callable[[Segment], Segment]
TEMPERATURE = 0.8


def draw(model: Path, dtype: str) -> list[tuple[GenerateRequest, Completion]]:
    """Truncated samples of a real engine with both recordings on."""
    rng = np.random.default_rng(0)
    requests = [
        GenerateRequest(
            prompt_token_ids=rng.integers(3, VOCAB_SIZE, 6 + i).astype(np.int32),
            seeds=(i, 100 + i),
            temperature=TEMPERATURE,
            top_p=0.8,
            top_k=0,
            max_new_tokens=48,
            stop_token_ids=(),
        )
        for i in range(12)
    ]
    config = RolloutConfig.model_validate({"dtype": dtype})
    engine = Engine(str(model), config, max_model_len=128, record_kept=True, record_routing=True)

    async def run() -> list[tuple[Completion, ...]]:
        return list(await asyncio.gather(*(engine.generate(request) for request in requests)))

    try:
        groups = asyncio.run(run())
    finally:
        engine.shutdown()
    return [(request, c) for request, group in zip(requests, groups, strict=True) for c in group]


def differences(
    learner: Learner, drawn: list[tuple[GenerateRequest, Completion]], change: Change, *, share_prompts: bool = False
) -> np.ndarray:
    """|log pi_learner - log pi_engine| of every token, with each record changed first."""
    objective = replace(OBJECTIVE, temperature=TEMPERATURE)
    segments = [change(completion_segment(request.prompt_token_ids, completion)) for request, completion in drawn]
    samples = tuple(TrainSample(i // 2, 0, "", 0.0, objective, (segment,)) for i, segment in enumerate(segments))
    batch = pack(MicroBatch(samples, (1.0,) * len(samples)), share_prompts=share_prompts)
    assert not share_prompts or batch.num_saved > 0, "the engine routed every prompt anew"
    scores = learner.score([batch])
    return np.abs(scores - np.concatenate([completion.behavior_logprobs for _, completion in drawn]))


def as_recorded(segment: Segment) -> Segment:
    return segment


def without_kept(segment: Segment) -> Segment:
    return replace(segment, replay=replace(segment.replay, kept=None))


def without_routes(segment: Segment) -> Segment:
    return replace(segment, replay=replace(segment.replay, routed_experts=None))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def measured(request, tmp_path_factory) -> tuple[str, dict[str, np.ndarray]]:
    model = make_qwen3_moe(tmp_path_factory.mktemp("m") / "moe", dtype=torch.bfloat16)
    drawn = draw(model, request.param)
    assert all(completion.find_record_error(len(r.prompt_token_ids)) == "" for r, completion in drawn)
    config = LearnerConfig(dtype="float32", gradient_checkpointing=False)
    learner = Learner(LearnerSpec(str(model), config, True, False, request.param, total_updates=1))
    changes = {"replayed": as_recorded, "no mask": without_kept, "no routes": without_routes}
    found = {name: differences(learner, drawn, change) for name, change in changes.items()}
    return request.param, found | {"shared": differences(learner, drawn, as_recorded, share_prompts=True)}


def test_with_both_replayed_the_learner_agrees_with_the_engine(measured):
    dtype, found = measured
    tolerance = {"float32": 2e-5, "bfloat16": 0.25}[dtype]
    assert len(found["replayed"]) > 1000 and found["replayed"].max() < tolerance
    assert found["shared"].max() < tolerance
    np.testing.assert_allclose(found["shared"], found["replayed"], rtol=0, atol=1e-5)


def test_without_the_sampling_mask_every_truncated_token_is_off(measured):
    _, found = measured
    assert found["no mask"].mean() > 10 * found["replayed"].mean() and found["no mask"].mean() > 0.1


def test_without_routes_a_half_precision_engine_disagrees_more(measured):
    dtype, found = measured
    if dtype == "float32":
        # In float32 both route alike up to near-ties, so there is nothing for the replay to repair.
        assert found["no routes"].mean() < 1e-5
    else:
        assert found["no routes"].mean() > 1.05 * found["replayed"].mean()
        assert np.quantile(found["no routes"], 0.999) > 1.2 * np.quantile(found["replayed"], 0.999)
