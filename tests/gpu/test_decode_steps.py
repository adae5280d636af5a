"""Steps of decoding alone draw what vLLM's own steps draw, to the bit; sequences come, end, grow and are preempted."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.types import Completion, GenerateRequest, KeptSets
from tests.tiny_models import VOCAB_SIZE, make_qwen3_moe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NUM_SEQUENCES, MAX_NEW_TOKENS = 24, 90
KV_CACHE_GIB = 0.0004  # some 550 tokens of the 2,200 that the sequences come to


def count(counts: dict[str, int], name: str, method: Any) -> Any:
    """The method, counted at each call."""

    def counted(*args: Any) -> Any:
        counts[name] += 1
        return method(*args)

    return counted


def make_requests() -> list[GenerateRequest]:
    """Prompts and answers of many lengths."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, VOCAB_SIZE, length) for length in generator.integers(5, 60, NUM_SEQUENCES)]
    lengths = generator.integers(10, MAX_NEW_TOKENS, NUM_SEQUENCES).tolist()
    return [
        GenerateRequest(prompt.astype(np.int32), (i,), 1.0, 0.9, 0, length, ())
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


async def draw(engine: Engine, requests: list[GenerateRequest]) -> list[Completion]:
    """All at once, and nothing cached: what is in which step is the same each time."""
    await engine._ask(lambda: engine._llm.reset_prefix_cache())
    gate = threading.Event()
    holding = asyncio.ensure_future(engine._ask(gate.wait))
    calls = [asyncio.ensure_future(engine.generate(request)) for request in requests]
    await asyncio.sleep(0.1)
    gate.set()
    await holding
    return [completion for group in await asyncio.gather(*calls) for completion in group]


def is_same(drawn: Completion, wanted: Completion) -> bool:
    """To the bit."""
    kept, kept_wanted = drawn.replay.kept, wanted.replay.kept
    assert isinstance(kept, KeptSets) and isinstance(kept_wanted, KeptSets)
    routes, routes_wanted = drawn.replay.routed_experts, wanted.replay.routed_experts
    return (
        np.array_equal(drawn.token_ids, wanted.token_ids)
        and np.array_equal(drawn.behavior_logprobs, wanted.behavior_logprobs)
        and np.array_equal(kept.ids, kept_wanted.ids)
        and routes is not None
        and routes_wanted is not None
        and np.array_equal(routes, routes_wanted)
    )


def test_decode_steps_draw_what_vllms_steps_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from rollout.vllm_plugin.decode_runner import DecodeRunner

    counts = {"_run": 0, "_make_rows": 0}
    find_rows = DecodeRunner._find_rows
    for name in counts:
        monkeypatch.setattr(DecodeRunner, name, count(counts, name, getattr(DecodeRunner, name)))
    config = RolloutConfig(kv_cache_gib=KV_CACHE_GIB, gpu_memory_fraction=0.3, max_batched_tokens=64)
    folder = make_qwen3_moe(tmp_path, dtype=torch.bfloat16)
    engine = Engine(str(folder), config, max_model_len=256, record_kept=True, record_routing=True)
    requests = make_requests()
    num_preemptions = []
    try:
        ours = asyncio.run(draw(engine, requests))
        num_run, num_made = counts.values()
        num_preemptions.append(engine.stats().num_preemptions)
        monkeypatch.setattr(DecodeRunner, "_find_rows", lambda self, step: None)
        wanted = asyncio.run(draw(engine, requests))
        assert counts["_run"] == num_run
        num_preemptions.append(engine.stats().num_preemptions)
        monkeypatch.setattr(DecodeRunner, "_find_rows", find_rows)
        again = asyncio.run(draw(engine, requests))
    finally:
        engine.shutdown()
    assert 2 * num_preemptions[0] == num_preemptions[1] > 0
    assert num_run > MAX_NEW_TOKENS and 2 < num_made < num_run
    assert [completion.num_tokens for completion in wanted] == [request.max_new_tokens for request in requests]
    assert all(map(is_same, ours, wanted)) and all(map(is_same, again, wanted))
