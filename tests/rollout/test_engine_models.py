"""The engine on other models, dtypes and settings; one engine lives at a time."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout.config import RolloutConfig
from rollout.engine import Engine, EngineDiedError, EngineError
from rollout.types import Completion, GenerateRequest
from tests.rollout.engine_reference import Comparison, compare, load_reference, recorded
from tests.tiny_models import VOCAB_SIZE, make_deepseek_v3, make_qwen3, make_qwen3_moe

FLOAT32 = RolloutConfig(dtype="float32")


@contextmanager
def running(folder: Path, config: RolloutConfig, *, record: bool = True) -> Iterator[Engine]:
    engine = Engine(str(folder), config, max_model_len=128, record_kept=record, record_routing=record)
    try:
        yield engine
    finally:
        engine.shutdown()


def make_requests(count: int) -> list[GenerateRequest]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, VOCAB_SIZE, rng.integers(3, 80)).astype(np.int32) for _ in range(count)]
    return [GenerateRequest(prompt, (i, 50 + i), 1.0, 0.8, 50, 25, ()) for i, prompt in enumerate(prompts)]


def generate(engine: Engine, requests: list[GenerateRequest]) -> list[tuple[GenerateRequest, Completion]]:
    async def run() -> list[tuple[Completion, ...]]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    groups = asyncio.run(run())
    return [(request, completion) for request, group in zip(requests, groups, strict=True) for completion in group]


def check(folder: Path, pairs: list[tuple[GenerateRequest, Completion]], dtype: torch.dtype) -> list[Comparison]:
    reference = load_reference(folder, dtype)
    for request, completion in pairs:
        assert completion.find_record_error(len(request.prompt_token_ids)) == ""
    return [compare(reference, request, completion) for request, completion in pairs]


def test_deepseek_v3(tmp_path: Path) -> None:
    folder = make_deepseek_v3(tmp_path)
    with running(folder, FLOAT32) as engine:
        pairs = generate(engine, make_requests(8))
    results = check(folder, pairs, torch.float32)
    assert max(np.abs(result.logprob_diff).max() for result in results) < 2e-5
    assert all(result.kept_agrees.all() and result.routes_agree.all() for result in results)
    _, routes = recorded(pairs[0][1])
    assert routes.shape[1:] == (3, 4)  # a row for the dense first layer too


def test_bfloat16_within_its_rounding(tmp_path: Path) -> None:
    """The reference rounds logits of size 4 to 1/64 and the engine does not; routes at near-ties may go another way."""
    folder = make_qwen3_moe(tmp_path, dtype=torch.bfloat16)
    with running(folder, RolloutConfig(dtype="bfloat16")) as engine:
        pairs = generate(engine, make_requests(8))
    results = check(folder, pairs, torch.bfloat16)
    diffs = np.abs(np.concatenate([result.logprob_diff for result in results]))
    assert np.percentile(diffs, 98) < 0.1 and diffs.mean() < 0.03
    assert np.concatenate([result.routes_agree for result in results]).mean() > 0.95
    assert np.concatenate([result.kept_agrees for result in results]).mean() > 0.5


def test_a_dense_model_has_no_routes(tmp_path: Path) -> None:
    folder = make_qwen3(tmp_path)
    with running(folder, FLOAT32) as engine:
        pairs = generate(engine, make_requests(4))
        with pytest.raises(EngineError, match="already runs an engine"):
            Engine(str(folder), FLOAT32, max_model_len=64, record_kept=True, record_routing=True)
    assert all(completion.replay.routed_experts is None for _, completion in pairs)
    results = check(folder, pairs, torch.float32)
    assert max(np.abs(result.logprob_diff).max() for result in results) < 2e-5
    assert all(result.kept_agrees.all() for result in results)


def test_seeds_decide_the_tokens_in_any_engine_and_batch(tmp_path: Path) -> None:
    folder = make_qwen3_moe(tmp_path)
    requests = make_requests(6)
    with running(folder, RolloutConfig(dtype="float32", max_batched_tokens=32, max_concurrent_sequences=4)) as engine:
        first = generate(engine, requests)
    with running(folder, FLOAT32, record=False) as engine:
        second = [generate(engine, [replace(r, seeds=(s,))])[0] for r in requests for s in r.seeds]
    for (_, ours), (_, again) in zip(first, second, strict=True):
        assert ours.token_ids.tolist() == again.token_ids.tolist()
        np.testing.assert_allclose(ours.behavior_logprobs, again.behavior_logprobs, atol=2e-5)
        assert again.replay.kept is None and again.replay.routed_experts is None
    assert len({tuple(completion.token_ids.tolist()) for _, completion in first}) == len(first)


def test_what_fails_in_the_engines_thread_reaches_every_caller(tmp_path: Path) -> None:
    request = make_requests(1)[0]

    def broken_step() -> None:
        raise ZeroDivisionError("a kernel failed")

    async def run(engine: Engine) -> None:
        long = replace(request, prompt_token_ids=np.array([5], np.int32), max_new_tokens=120)
        calls = [asyncio.ensure_future(engine.generate(long)) for _ in range(3)]
        while engine.stats().num_running == 0:
            await asyncio.sleep(0.001)
        engine._llm.step = broken_step
        for call in calls:
            with pytest.raises(EngineDiedError, match="died in a step: ZeroDivisionError: a kernel failed") as caught:
                await asyncio.wait_for(call, 10)
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
        for late in (engine.generate(request), engine.begin_weight_update(), engine.abort()):
            with pytest.raises(EngineDiedError, match="a kernel failed"):
                await asyncio.wait_for(late, 10)

    with running(make_qwen3(tmp_path), FLOAT32) as engine:
        asyncio.run(run(engine))


def test_a_step_that_fails_while_an_update_waits_for_it_is_the_engines_end(tmp_path: Path) -> None:
    """Not a failed update, after which a complete one would make the engine whole again."""

    def broken_step() -> None:
        raise ZeroDivisionError("a kernel failed")

    async def run(engine: Engine) -> None:
        engine._llm.step = broken_step
        engine._core.batch_queue = deque([object()])  # a step in flight
        for _ in range(2):
            with pytest.raises(EngineDiedError, match="died in a step: ZeroDivisionError: a kernel failed"):
                await asyncio.wait_for(engine.begin_weight_update(), 10)

    with running(make_qwen3(tmp_path), FLOAT32) as engine:
        asyncio.run(run(engine))


def test_shutdown_fails_what_is_pending(tmp_path: Path) -> None:
    request = replace(make_requests(1)[0], prompt_token_ids=np.array([5], np.int32), max_new_tokens=120)

    async def run(engine: Engine) -> None:
        call = asyncio.ensure_future(engine.generate(request))
        while engine.stats().num_running == 0:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.shutdown)
        with pytest.raises(EngineError, match="was shut down"):
            await asyncio.wait_for(call, 10)
        with pytest.raises(EngineError, match="was shut down"):
            await engine.generate(request)

    with running(make_qwen3(tmp_path), FLOAT32) as engine:
        asyncio.run(run(engine))


def test_shutdown_frees_the_first_engine_of_a_process(tmp_path: Path) -> None:
    """It is the one whose start imports vLLM, which keeps errors of that with the stack that they were raised on."""
    code = """
import sys, weakref
from rollout.config import RolloutConfig
from rollout.engine import Engine

config = RolloutConfig(dtype="float32")
engine = Engine(sys.argv[1], config, max_model_len=64, record_kept=True, record_routing=True)
model = weakref.ref(engine._core.model_executor.driver_worker.worker.model_runner.model)
assert model() is not None
engine.shutdown()
assert model() is None, "the engine was shut down, and its model is still there"
"""
    subprocess.run([sys.executable, "-c", code, str(make_qwen3_moe(tmp_path))], check=True)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="vLLM could not be started"):
        Engine(str(tmp_path / "nothing"), FLOAT32, max_model_len=64, record_kept=True, record_routing=True)
