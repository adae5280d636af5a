"""Records of a real engine under load, against transformers on the same weights (float32 unless said)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.types import Completion, FinishReason, GenerateRequest
from tests.rollout.engine_reference import compare, load_reference, recorded
from tests.tiny_models import VOCAB_SIZE, make_qwen3_moe

SMALL = RolloutConfig(dtype="float32", kv_cache_gib=0.002, max_batched_tokens=48, max_concurrent_sequences=32)
"""So little room that prompts are prefilled in chunks and sequences lose their cache."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_moe(tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    return load_reference(folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = Engine(str(folder), SMALL, max_model_len=256, record_kept=True, record_routing=True)
    yield engine
    engine.shutdown()


def make_requests(count: int) -> list[GenerateRequest]:
    """Half the prompts share 70 tokens; temperatures, nuclei, top-k bounds and lengths are mixed."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, VOCAB_SIZE, 70)
    requests = []
    for i in range(count):
        own = rng.integers(3, VOCAB_SIZE, rng.integers(3, 60))
        prompt = np.concatenate([shared, own]) if i % 2 else own
        requests.append(
            GenerateRequest(
                prompt_token_ids=prompt.astype(np.int32),
                seeds=(i, i + 1000),
                temperature=(1.0, 0.7)[i % 2],
                top_p=(0.9, 0.6, 1.0)[i % 3],
                top_k=(0, 20)[i % 5 == 0 or i % 3 == 2],
                max_new_tokens=40,
                stop_token_ids=(7, 11),
            )
        )
    return requests


def generate_all(engine: Engine, requests: Sequence[GenerateRequest]) -> list[tuple[Completion, ...]]:
    async def run() -> list[tuple[Completion, ...]]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    return asyncio.run(run())


@pytest.fixture(scope="module")
def requests() -> list[GenerateRequest]:
    return make_requests(24)


@pytest.fixture(scope="module")
def groups(engine: Engine, requests: list[GenerateRequest]) -> list[tuple[Completion, ...]]:
    return generate_all(engine, requests)


def long_request(seed: int, num_tokens: int = 150) -> GenerateRequest:
    prompt = np.arange(3, 15, dtype=np.int32)
    return GenerateRequest(prompt, (seed,), 1.0, 0.9, 0, num_tokens, ())


def test_load_was_real(engine: Engine, groups: list[tuple[Completion, ...]], requests: list[GenerateRequest]) -> None:
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.cached_prompt_tokens > 0
    assert max(len(request.prompt_token_ids) for request in requests) > 2 * SMALL.max_batched_tokens  # hence chunks
    assert stats.num_steps * 4 < stats.generated_tokens  # hence batches
    assert stats.generated_tokens == sum(c.num_tokens for group in groups for c in group)


def test_records_agree_with_transformers_under_load(
    reference: PreTrainedModel, groups: list[tuple[Completion, ...]], requests: list[GenerateRequest]
) -> None:
    pairs = [(r, c) for r, group in zip(requests, groups, strict=True) for c in group]
    results = [compare(reference, request, completion) for request, completion in pairs]
    assert max(np.abs(result.logprob_diff).max() for result in results) < 2e-5
    assert all(result.kept_agrees.all() for result in results)
    assert all(result.routes_agree.all() for result in results)
    for request, completion in pairs:
        assert completion.find_record_error(len(request.prompt_token_ids)) == ""
        kept, routes = recorded(completion)
        assert kept.contains(completion.token_ids).all()
        assert all((np.diff(kept.row(t)) > 0).all() for t in range(completion.num_tokens))
        assert routes.dtype == np.uint8
        assert (completion.policy_versions == 0).all()


def test_completions_end_as_asked(groups: list[tuple[Completion, ...]], requests: list[GenerateRequest]) -> None:
    assert {c.finish_reason for group in groups for c in group} == {FinishReason.STOP, FinishReason.LENGTH}
    for request, group in zip(requests, groups, strict=True):
        assert tuple(c.seed for c in group) == request.seeds
        for completion in group:
            stops = np.isin(completion.token_ids, request.stop_token_ids)
            assert not stops[:-1].any()
            assert stops[-1] == (completion.finish_reason is FinishReason.STOP)
            if completion.finish_reason is FinishReason.LENGTH:
                assert completion.num_tokens == request.max_new_tokens


def test_no_truncation_means_no_kept_sets(engine: Engine, reference: PreTrainedModel) -> None:
    request = replace(long_request(3, 30), top_p=1.0)
    (completion,) = generate_all(engine, [request])[0]
    assert completion.replay.kept is None
    assert np.abs(compare(reference, request, completion).logprob_diff).max() < 2e-5


def test_top_k_one_is_greedy(engine: Engine, reference: PreTrainedModel) -> None:
    request = replace(long_request(0, 20), top_k=1, top_p=1.0)
    (completion,) = generate_all(engine, [request])[0]
    token_ids = torch.from_numpy(np.concatenate([request.prompt_token_ids, completion.token_ids]).astype(np.int64))
    with torch.no_grad():
        best = reference(token_ids[None]).logits[0, len(request.prompt_token_ids) - 1 : -1].argmax(-1)
    assert best.tolist() == completion.token_ids.tolist()
    assert (completion.behavior_logprobs == 0).all()
    assert (np.diff(recorded(completion)[0].offsets) == 1).all()


def test_cancelling_a_call_aborts_its_sequences_only(engine: Engine) -> None:
    async def run() -> tuple[int, tuple[Completion, ...]]:
        doomed = asyncio.ensure_future(engine.generate(replace(long_request(1, 240), seeds=(1, 2, 3))))
        kept = asyncio.ensure_future(engine.generate(long_request(4, 60)))
        await asyncio.sleep(0.05)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        result = await kept
        steps = engine.stats().num_steps
        while (stats := engine.stats()).num_running + stats.num_waiting:  # a result comes before its step has ended
            await asyncio.sleep(0.001)
        return stats.num_steps - steps, result

    before = engine.stats().num_finished
    steps_left, (completion,) = asyncio.run(run())
    assert steps_left < 20  # the others would have 180
    assert completion.num_tokens == 60
    assert engine.stats().num_finished == before + 1


def test_abort_returns_aligned_records(engine: Engine, reference: PreTrainedModel) -> None:
    requests = [replace(long_request(10 + i), prompt_token_ids=np.full(5 + 9 * i, 9, np.int32)) for i in range(5)]

    async def run() -> list[tuple[Completion, ...]]:
        calls = [asyncio.ensure_future(engine.generate(request)) for request in requests]
        while engine.stats().num_running < len(requests):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.03)
        await engine.abort()
        return await asyncio.gather(*calls)

    groups = asyncio.run(run())
    assert engine.stats().num_running == 0
    for request, (completion,) in zip(requests, groups, strict=True):
        assert completion.finish_reason is FinishReason.ABORT
        assert 0 < completion.num_tokens < request.max_new_tokens
        assert completion.find_record_error(len(request.prompt_token_ids)) == ""
        result = compare(reference, request, completion)
        assert np.abs(result.logprob_diff).max() < 2e-5
        assert result.kept_agrees.all() and result.routes_agree.all()


def test_calls_from_two_event_loops(engine: Engine) -> None:
    async def run() -> tuple[tuple[Completion, ...], tuple[Completion, ...]]:
        other_loop = asyncio.to_thread(lambda: asyncio.run(engine.generate(long_request(20, 10))))
        return await asyncio.gather(engine.generate(long_request(20, 10)), other_loop)

    here, there = asyncio.run(run())
    assert here[0].token_ids.tolist() == there[0].token_ids.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_token_ids": np.zeros(256, np.int32)}, "raise max_model_len"),
        ({"prompt_token_ids": np.zeros(0, np.int32)}, "prompt_token_ids holds 0"),
        ({"seeds": (-1,)}, "seeds"),
        ({"temperature": 0.0}, "greedy is top_k = 1"),
        ({"prompt_token_ids": np.array([5, VOCAB_SIZE + 900], np.int32)}, "another model's tokenizer"),
    ],
)
def test_a_request_that_cannot_be_served_fails_alone(engine: Engine, change: dict[str, object], message: str) -> None:
    async def run() -> tuple[Completion, ...]:
        good = asyncio.ensure_future(engine.generate(long_request(1, 5)))
        with pytest.raises(ValueError, match=message):
            await engine.generate(replace(long_request(1, 5), **change))
        return await good

    assert asyncio.run(run())[0].num_tokens == 5
