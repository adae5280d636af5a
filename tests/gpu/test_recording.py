"""The sampler on a GPU: its kernels against vLLM's and float64, and an engine short of room against transformers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.rollout.test_draw import ROWS, compare, draws_routes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCAB_SIZE = 100_003  # ten chunks of a row, the last one not full


def test_draws() -> None:
    pytest.importorskip("vllm")
    results = compare(torch.device("cuda"), VOCAB_SIZE)
    assert set(results) == set(ROWS)
    for name, (is_right, as_vllm, as_stand_in, was_walked, error) in results.items():
        assert is_right and as_vllm and as_stand_in and error < 1e-5, name
        assert was_walked == ("below the cut" in name), name


@pytest.mark.parametrize("num_experts", [200, 300])
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_routes(num_experts: int, num_tokens: int) -> None:
    pytest.importorskip("vllm")
    assert draws_routes(torch.device("cuda"), VOCAB_SIZE, num_experts, num_tokens)


def test_an_engine_short_of_room(tmp_path: Path) -> None:
    """Two steps in flight, prompts in chunks, a prefix cache and preemption; bfloat16, hence the tolerances."""
    pytest.importorskip("vllm")
    from rollout.config import RolloutConfig
    from rollout.engine import Engine
    from rollout.types import Completion
    from tests.rollout.engine_reference import compare, load_reference
    from tests.rollout.test_engine import make_requests
    from tests.tiny_models import make_qwen3_moe

    requests = make_requests(24)
    config = RolloutConfig(enforce_eager=True, kv_cache_gib=0.001, gpu_memory_fraction=0.3, max_batched_tokens=48)
    folder = make_qwen3_moe(tmp_path, dtype=torch.bfloat16)
    engine = Engine(str(folder), config, max_model_len=256, record_kept=True, record_routing=True)

    async def run() -> list[tuple[Completion, ...]]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    try:
        groups, stats = asyncio.run(run()), engine.stats()
        assert engine._core.batch_queue_size == 2
    finally:
        engine.shutdown()
    assert stats.num_preemptions > 0 and stats.cached_prompt_tokens > 0
    pairs = [(request, c) for request, group in zip(requests, groups, strict=True) for c in group]
    assert all(c.find_record_error(len(request.prompt_token_ids)) == "" for request, c in pairs)
    model = load_reference(folder, torch.bfloat16)
    results = [compare(model, request, completion) for request, completion in pairs]
    assert np.abs(np.concatenate([result.logprob_diff for result in results])).mean() < 0.03
    assert np.concatenate([result.routes_agree for result in results]).mean() > 0.95
