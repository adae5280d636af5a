"""Keel's scheduler and recorder against vLLM's own scheduler, recording and output processor, request by request."""

from __future__ import annotations

import asyncio
import gc
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.core_model_loading import revert_weight_conversion

from rollout.config import RolloutConfig
from rollout.engine import Engine, EngineError
from rollout.types import Completion, FinishReason, GenerateRequest
from rollout.vllm_plugin.record import sampling_params
from rollout.vllm_plugin.start import _common_arguments, _cpu_arguments, _set_environment
from rollout.weight_sync import pack_buckets
from tests.rollout.engine_reference import compare, load_reference, recorded
from tests.tiny_models import VOCAB_SIZE, make_qwen3_moe, perturb

MAX_MODEL_LEN = 160
SMALL = RolloutConfig(dtype="float32", kv_cache_gib=0.002, max_batched_tokens=48, max_concurrent_sequences=24)
"""So little room that sequences lose their cache and wait for room."""


@dataclass(frozen=True)
class Reference:
    """What vLLM itself returns for one sequence."""

    token_ids: list[int]
    logprobs: np.ndarray
    kept: list[list[int]]
    routes: np.ndarray
    finish_reason: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_moe(tmp_path_factory.mktemp("qwen3_moe"))


def make_requests(count: int) -> list[GenerateRequest]:
    """Shared and own prompts; lengths that end inside, at and beyond a block, some at the model's own bound."""
    rng = np.random.default_rng(1)
    shared = rng.integers(3, VOCAB_SIZE, 66)
    requests = []
    for i in range(count):
        own = rng.integers(3, VOCAB_SIZE, rng.integers(1, 60))
        prompt = np.concatenate([shared, own]) if i % 3 == 0 else own
        lengths = (1, 31, 32, 33, 60, 200)
        requests.append(
            GenerateRequest(
                prompt_token_ids=prompt.astype(np.int32),
                seeds=(i,),
                temperature=(1.0, 0.8)[i % 2],
                top_p=(0.9, 0.6, 0.97)[i % 3],
                top_k=(0, 20)[i % 4 == 0],
                max_new_tokens=lengths[i % len(lengths)],
                stop_token_ids=((), (7, 11), (5,))[i % 3],
            )
        )
    return requests


@pytest.fixture(scope="module")
def requests() -> list[GenerateRequest]:
    return make_requests(48)


@pytest.fixture(scope="module")
def reference(folder: Path, requests: list[GenerateRequest]) -> list[Reference]:
    """vLLM as it is, with room for everything."""
    config = replace_config(SMALL, kv_cache_gib=0.1)
    _set_environment(config)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    arguments = _common_arguments(str(folder), config) | _cpu_arguments(config, latent_attention=False)
    del arguments["scheduler_cls"]
    recording = {"return_sampling_mask": True, "enable_return_routed_experts": True, "max_model_len": MAX_MODEL_LEN}
    llm = LLMEngine.from_engine_args(EngineArgs(**arguments, **recording))
    for i, request in enumerate(requests):
        prompt: Any = {"prompt_token_ids": request.prompt_token_ids.tolist()}
        llm.add_request(str(i), prompt, sampling_params(request, request.seeds[0], VOCAB_SIZE))
    outputs: dict[str, Any] = {}
    while llm.has_unfinished_requests():
        finished: list[Any] = llm.step()
        outputs |= {output.request_id: output.outputs[0] for output in finished}
    llm.engine_core.shutdown()
    del llm
    gc.collect()
    return [read_reference(outputs[str(i)]) for i in range(len(requests))]


def replace_config(config: RolloutConfig, **changes: Any) -> RolloutConfig:
    return config.model_copy(update=changes)


def read_reference(output: Any) -> Reference:
    return Reference(
        token_ids=list(output.token_ids),
        logprobs=np.asarray(output.logprobs.logprobs, np.float32),
        kept=output.sampling_mask.token_ids,
        routes=output.routed_experts,
        finish_reason=output.finish_reason,
    )


@contextmanager
def running(folder: Path, *, num_batches: int) -> Iterator[Engine]:
    """An engine in which so many batches are in flight at a time; on a GPU vLLM has two."""
    engine = Engine(str(folder), SMALL, max_model_len=MAX_MODEL_LEN, record_kept=True, record_routing=True)

    def let_fly() -> None:
        core = engine._core
        core.batch_queue_size, core.batch_queue = num_batches, deque(maxlen=num_batches)
        core.step_fn = core.step_with_batch_queue

    try:
        if num_batches > 1:
            asyncio.run(engine._ask(let_fly))
        yield engine
    finally:
        engine.shutdown()


def generate(engine: Engine, requests: list[GenerateRequest]) -> list[Completion]:
    async def run() -> list[tuple[Completion, ...]]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    return [completion for group in asyncio.run(run()) for completion in group]


@pytest.mark.parametrize("num_batches", [1, 2], ids=["one batch in flight", "two batches in flight"])
def test_every_sequence_is_vllms_own(
    folder: Path, requests: list[GenerateRequest], reference: list[Reference], num_batches: int
) -> None:
    with running(folder, num_batches=num_batches) as engine:
        completions = generate(engine, requests)
        stats = engine.stats()
        counts = asyncio.run(engine._ask(lambda: engine._core.scheduler.kv_cache_manager.usage))
    assert stats.num_preemptions > 0 and stats.cached_prompt_tokens > 0
    assert counts == 0  # every block has been given back
    assert {c.finish_reason for c in completions} == {FinishReason.STOP, FinishReason.LENGTH}
    for request, ours, theirs in zip(requests, completions, reference, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids
        assert ours.finish_reason == theirs.finish_reason
        np.testing.assert_allclose(ours.behavior_logprobs, theirs.logprobs, atol=2e-5)
        kept, routes = recorded(ours)
        assert [kept.row(t).tolist() for t in range(ours.num_tokens)] == theirs.kept
        np.testing.assert_array_equal(routes, theirs.routes)
        assert ours.find_record_error(len(request.prompt_token_ids)) == ""


def test_nothing_is_computed_beyond_a_last_token(folder: Path) -> None:
    """The last token on its way is counted: the step after it leaves the sequence out."""
    beyond: list[str] = []

    def watch(scheduler: Any) -> None:
        schedule = scheduler.schedule

        def watched(*args: Any) -> Any:
            output = schedule(*args)
            step = output.scheduled_cached_reqs
            for request_id, computed in zip(step.req_ids, step.num_computed_tokens, strict=True):
                last = scheduler.requests[request_id].num_prompt_tokens + scheduler._live[request_id].max_tokens - 2
                beyond.extend([request_id] * (computed > last))
            return output

        scheduler.schedule = watched

    with running(folder, num_batches=2) as engine:
        asyncio.run(engine._ask(lambda: watch(engine._core.scheduler)))
        generate(engine, [replace(request, stop_token_ids=()) for request in make_requests(12)])
    assert not beyond


def test_aborted_with_two_batches_in_flight(folder: Path) -> None:
    model = load_reference(folder)
    requests = [replace(r, max_new_tokens=90, stop_token_ids=()) for r in make_requests(30)]

    async def run(engine: Engine) -> list[tuple[Completion, ...]]:
        calls = [asyncio.ensure_future(engine.generate(request)) for request in requests]
        while engine.stats().num_steps < 60:
            await asyncio.sleep(0.001)
        await engine.abort()
        first = await asyncio.gather(*calls)
        return [*first, await engine.generate(requests[0])]

    with running(folder, num_batches=2) as engine:
        groups = asyncio.run(run(engine))
        assert engine.stats().num_running == 0
    assert {c.finish_reason for (c,) in groups[:-1]} >= {FinishReason.ABORT}
    for request, (completion,) in zip([*requests, requests[0]], groups, strict=True):
        if completion.num_tokens:
            assert completion.find_record_error(len(request.prompt_token_ids)) == ""
            result = compare(model, request, completion)
            assert np.abs(result.logprob_diff).max() < 2e-5
            assert result.kept_agrees.all() and result.routes_agree.all()


def test_updated_with_two_batches_in_flight(folder: Path) -> None:
    """New weights between two steps: tokens, sets and routes before and after are those of the weights of the time."""
    old, new = load_reference(folder), load_reference(folder)
    perturb(new, seed=3)
    tensors = list(revert_weight_conversion(new, new.state_dict()).items())
    requests = [replace(r, max_new_tokens=90, stop_token_ids=()) for r in make_requests(16)]

    async def run(engine: Engine) -> list[tuple[Completion, ...]]:
        calls = [asyncio.ensure_future(engine.generate(request)) for request in requests]
        while engine.stats().num_steps < 40:
            await asyncio.sleep(0.001)
        await engine.begin_weight_update()
        for bucket in pack_buckets(tensors, max_bytes=1_000_000):
            await engine.load_weights(bucket)
        await engine.finish_weight_update(1)
        return await asyncio.gather(*calls)

    with running(folder, num_batches=2) as engine:
        pairs = [(request, c) for request, (c,) in zip(requests, asyncio.run(run(engine)), strict=True)]
    assert any(0 < c.policy_versions.sum() < c.num_tokens for _, c in pairs)
    for request, completion in pairs:
        switch = int((completion.policy_versions == 0).sum())
        assert (np.diff(completion.policy_versions) >= 0).all()
        before, after = compare(old, request, completion), compare(new, request, completion)
        boundary = len(request.prompt_token_ids) + switch - 1 if switch else 0
        assert np.abs(np.append(before.logprob_diff[:switch], after.logprob_diff[switch:])).max() < 2e-5
        assert before.kept_agrees[:switch].all() and after.kept_agrees[switch:].all()
        assert before.routes_agree[:boundary].all() and after.routes_agree[boundary:].all()


def test_a_request_that_wants_more_is_refused(folder: Path) -> None:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    def add(engine: Engine) -> None:
        params = SamplingParams(max_tokens=5, min_tokens=2)
        engine._core.add_request(Request("x", [5, 6], params, None))

    with running(folder, num_batches=1) as engine, pytest.raises(EngineError, match="asks for more than tokens drawn"):
        asyncio.run(engine._ask(lambda: add(engine)))
