"""Weights replaced in a running engine, through the worker: in flight, half way, damaged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rollout.config import RolloutConfig
from rollout.engine import EngineError
from rollout.types import Completion, GenerateRequest
from rollout.weight_sync import DeviceBuffer, WeightBucket, pack_buckets, unpack_bucket
from rollout.worker import RolloutWorker
from tests.rollout.engine_reference import compare, load_reference
from tests.tiny_models import make_deepseek_v3, make_qwen3_moe, perturb

Tensors = list[tuple[str, Tensor]]
NUM_SLOTS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_moe(tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[RolloutWorker]:
    config = RolloutConfig(dtype="float32", max_concurrent_sequences=NUM_SLOTS)
    worker = RolloutWorker(str(folder), config, max_model_len=256, record_kept=True, record_routing=True)
    yield worker
    asyncio.run(worker.shutdown())


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return load_reference(folder)


def checkpoint(model: PreTrainedModel) -> Tensors:
    """The tensors under the names of the checkpoint: one per expert."""
    return list(revert_weight_conversion(model, model.state_dict()).items())


async def send(worker: RolloutWorker, tensors: Iterable[tuple[str, Tensor]], version: int, *, max_bytes: int) -> None:
    await worker.begin_weight_update()
    for bucket in pack_buckets(tensors, max_bytes=max_bytes):
        await worker.load_weights(bucket)
    await worker.finish_weight_update(version)


async def running(worker: RolloutWorker, count: int) -> None:
    """Waits until so many sequences run."""
    async with asyncio.timeout(10):
        while (await worker.stats()).num_running < count:
            await asyncio.sleep(0.001)


def make_request(seed: int, num_tokens: int = 30) -> GenerateRequest:
    return GenerateRequest(np.arange(3, 40, dtype=np.int32), (seed,), 1.0, 0.9, 0, num_tokens, ())


def error_of(model: PreTrainedModel, request: GenerateRequest, completion: Completion) -> float:
    return float(np.abs(compare(model, request, completion).logprob_diff).max())


def generate(worker: RolloutWorker, request: GenerateRequest) -> Completion:
    return asyncio.run(worker.generate(request))[0]


def shuffled(tensors: Tensors) -> Tensors:
    order = np.random.default_rng(0).permutation(len(tensors))
    return [tensors[i] for i in order]


@pytest.mark.parametrize("order", [list, shuffled], ids=["in order", "shuffled"])
@pytest.mark.parametrize("max_bytes", [50_000, 10_000_000])
def test_new_weights_equal_transformers(
    worker: RolloutWorker, model: PreTrainedModel, order: Callable[[Tensors], Tensors], max_bytes: int
) -> None:
    request = make_request(1)
    generate(worker, request)  # fills the prefix cache with the old weights' values
    perturb(model, seed=max_bytes + len(order.__name__))
    asyncio.run(send(worker, order(checkpoint(model)), 3, max_bytes=max_bytes))
    completion = generate(worker, request)
    result = compare(model, request, completion)
    assert np.abs(result.logprob_diff).max() < 2e-5
    assert result.kept_agrees.all() and result.routes_agree.all()
    assert (completion.policy_versions == 3).all()
    assert asyncio.run(worker.stats()).policy_version == 3


def test_fused_expert_names_load_too(worker: RolloutWorker, model: PreTrainedModel) -> None:
    perturb(model, seed=5)
    assert any(name.endswith("experts.gate_up_proj") for name in model.state_dict())
    asyncio.run(send(worker, model.state_dict().items(), 4, max_bytes=100_000))
    assert error_of(model, make_request(2), generate(worker, make_request(2))) < 2e-5


def test_an_engine_sleeps_only_if_it_was_started_to(worker: RolloutWorker) -> None:
    with pytest.raises(EngineError, match=r"rollout\.sleep_while_training"):
        asyncio.run(worker.sleep())
    assert generate(worker, make_request(3)).num_tokens == 30


def test_a_request_that_goes_first_does_not_wait_for_those_that_an_update_stopped(
    worker: RolloutWorker, model: PreTrainedModel
) -> None:
    async def run() -> None:
        calls = [asyncio.ensure_future(worker.generate(make_request(seed, 100))) for seed in range(NUM_SLOTS + 4)]
        await running(worker, NUM_SLOTS)
        await worker.begin_weight_update()
        first = asyncio.ensure_future(worker.generate(replace(make_request(99, 4), goes_first=True)))
        await asyncio.sleep(0)
        for bucket in pack_buckets(checkpoint(model), max_bytes=1_000_000):
            await worker.load_weights(bucket)
        await worker.finish_weight_update(20)
        (completion,) = await first
        assert completion.num_tokens == 4 and not any(call.done() for call in calls)
        assert [c.num_tokens for call in calls for c in await call] == [100] * len(calls)

    asyncio.run(run())


def test_sequences_that_go_first_run_beside_the_others_and_take_no_place_of_theirs(worker: RolloutWorker) -> None:
    async def run() -> None:
        calls = [asyncio.ensure_future(worker.generate(make_request(seed, 100))) for seed in range(NUM_SLOTS + 4)]
        await running(worker, NUM_SLOTS)
        request = replace(make_request(99, 40), seeds=(99, 100, 101), goes_first=True)
        first = asyncio.ensure_future(worker.generate(request))
        await running(worker, NUM_SLOTS + 3)
        assert [c.num_tokens for c in await first] == [40, 40, 40] and not any(call.done() for call in calls)
        async with asyncio.timeout(10):
            while (await worker.stats()).num_running > NUM_SLOTS:
                await asyncio.sleep(0.001)
        assert (await worker.stats()).num_waiting == 4 and not any(call.done() for call in calls)
        assert [c.num_tokens for call in calls for c in await call] == [100] * len(calls)

    asyncio.run(run())


def test_running_requests_go_on_under_the_new_weights(
    worker: RolloutWorker, model: PreTrainedModel, folder: Path
) -> None:
    asyncio.run(send(worker, checkpoint(model), 10, max_bytes=1_000_000))
    old, new = model, load_reference(folder)
    perturb(new, seed=6)
    requests = [make_request(seed, 200) for seed in range(6)]

    async def run() -> tuple[list[Completion], Completion]:
        calls = [asyncio.ensure_future(worker.generate(request)) for request in requests]
        await running(worker, len(requests))
        await asyncio.sleep(0.05)
        await worker.begin_weight_update()
        steps = (await worker.stats()).num_steps
        late = asyncio.ensure_future(worker.generate(make_request(99)))
        for bucket in pack_buckets(checkpoint(new), max_bytes=100_000):
            await worker.load_weights(bucket)
        await asyncio.sleep(0.05)
        assert (await worker.stats()).num_steps == steps and not late.done()  # nothing moves meanwhile
        await worker.finish_weight_update(11)
        return [(await call)[0] for call in calls], (await late)[0]

    completions, late = asyncio.run(run())
    assert (late.policy_versions == 11).all()
    assert error_of(new, make_request(99), late) < 2e-5
    for request, completion in zip(requests, completions, strict=True):
        switch = int((completion.policy_versions == 10).sum())
        assert completion.policy_versions.tolist() == [10] * switch + [11] * (200 - switch)
        assert 0 < switch < 200
        by_old, by_new = compare(old, request, completion), compare(new, request, completion)
        assert np.abs(by_old.logprob_diff[:switch]).max() < 2e-5
        assert np.abs(by_new.logprob_diff[switch:]).max() < 2e-5
        assert by_old.kept_agrees[:switch].all() and by_new.kept_agrees[switch:].all()
        assert np.abs(by_old.logprob_diff[switch:]).max() > 0.05  # the spans are told apart, not both right
        # The token at the switch was fed after it; every row before was computed by the weights that drew from it.
        boundary = len(request.prompt_token_ids) + switch - 1
        assert by_old.routes_agree[:boundary].all()
        assert by_new.routes_agree[boundary:].all()


def test_a_swapped_expert_shows(worker: RolloutWorker, model: PreTrainedModel) -> None:
    perturb(model, seed=7)
    tensors = dict(checkpoint(model))
    first, second = (f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in (0, 1))
    damaged = tensors | {first: tensors[second], second: tensors[first]}
    request = make_request(5, 100)
    asyncio.run(send(worker, damaged.items(), 20, max_bytes=1_000_000))
    assert error_of(model, request, generate(worker, request)) > 1e-3
    asyncio.run(send(worker, tensors.items(), 21, max_bytes=1_000_000))
    assert error_of(model, request, generate(worker, request)) < 2e-5


def break_shape(tensors: Tensors) -> Tensors:
    name, tensor = tensors[30]
    return [*tensors[:30], (name, tensor[:, :-1].contiguous()), *tensors[31:]]


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: [(name, tensor) for name, tensor in tensors if part not in name]


@pytest.mark.parametrize(
    "damage",
    [
        break_shape,
        without("layers.1.mlp.experts.3."),
        without("layers.0.self_attn.k_proj"),
        without("model.norm"),
        without("embed_tokens"),
        lambda tensors: tensors[:40],
    ],
    ids=["wrong shape", "an expert", "part of a fused module", "a norm", "the embedding", "the rest"],
)
def test_a_failed_update_bars_generation_until_a_complete_one(
    worker: RolloutWorker, model: PreTrainedModel, damage: Callable[[Tensors], Tensors]
) -> None:
    perturb(model, seed=8)
    request = make_request(6)

    async def run() -> None:
        pending = asyncio.ensure_future(worker.generate(make_request(7, 200)))
        await running(worker, 1)
        with pytest.raises(EngineError, match="a weight update could not"):
            await send(worker, damage(checkpoint(model)), 30, max_bytes=100_000)
        with pytest.raises(EngineError, match="run a complete one before generating"):
            await pending
        with pytest.raises(EngineError, match="run a complete one before generating"):
            await worker.generate(request)
        with pytest.raises(EngineError, match="call begin_weight_update first"):
            await worker.finish_weight_update(31)

    asyncio.run(run())
    asyncio.run(send(worker, checkpoint(model), 32, max_bytes=100_000))
    completion = generate(worker, request)
    assert error_of(model, request, completion) < 2e-5
    assert (completion.policy_versions == 32).all()


def test_an_update_that_was_left_alone_can_begin_anew(worker: RolloutWorker, model: PreTrainedModel) -> None:
    perturb(model, seed=9)
    tensors = checkpoint(model)

    async def leave() -> None:
        await worker.begin_weight_update()
        for bucket in list(pack_buckets(tensors, max_bytes=100_000))[:5]:
            await worker.load_weights(bucket)

    asyncio.run(leave())
    asyncio.run(send(worker, tensors, 40, max_bytes=100_000))
    assert error_of(model, make_request(8), generate(worker, make_request(8))) < 2e-5


def test_read_only_buckets_load(worker: RolloutWorker, model: PreTrainedModel) -> None:
    """What arrives through shared memory cannot be written to."""
    perturb(model, seed=10)

    async def run() -> None:
        await worker.begin_weight_update()
        for bucket in pack_buckets(checkpoint(model), max_bytes=100_000):
            frozen = np.array(bucket.buffer)
            frozen.flags.writeable = False
            await worker.load_weights(replace(bucket, buffer=frozen))
        await worker.finish_weight_update(50)

    asyncio.run(run())
    assert error_of(model, make_request(9), generate(worker, make_request(9))) < 2e-5


@pytest.mark.parametrize("max_bytes", [3_000, 10_000_000])
def test_experts_that_lie_in_one_piece_are_loaded_at_once(
    worker: RolloutWorker, model: PreTrainedModel, max_bytes: int
) -> None:
    def left_to_vllm(wrapper: Any, bucket: WeightBucket) -> list[str]:
        loader = wrapper.worker.weight_transfer_engine._whole_experts
        return [name for name, _ in loader.load(unpack_bucket(bucket)) if ".experts." in name]

    async def run() -> list[str]:
        engine, names = worker._engine, []
        await worker.begin_weight_update()
        for bucket in pack_buckets(checkpoint(model), max_bytes=max_bytes):
            call = partial(engine._llm.collective_rpc, left_to_vllm, args=(bucket,))
            names += (await engine._ask(call))[0]
        return names

    expected = [name for name, _ in checkpoint(model) if ".experts." in name]
    assert asyncio.run(run()) == ([] if max_bytes > 1_000_000 else expected)
    asyncio.run(send(worker, checkpoint(model), 55, max_bytes=max_bytes))
    assert error_of(model, make_request(11), generate(worker, make_request(11))) < 2e-5


@pytest.mark.parametrize("max_bytes", [3_000, 100_000])
def test_a_buffer_may_be_filled_again_when_its_bucket_is_loaded(
    worker: RolloutWorker, model: PreTrainedModel, max_bytes: int
) -> None:
    """As memory of the GPU that both ends share is. Layers take up to sixteen of the small buckets."""
    perturb(model, seed=max_bytes)
    memory = torch.empty(200_000, dtype=torch.uint8)

    async def run() -> None:
        await worker.begin_weight_update()
        for bucket in pack_buckets(checkpoint(model), max_bytes=max_bytes):
            memory[: bucket.num_bytes] = torch.from_numpy(bucket.buffer)
            shared = DeviceBuffer(lambda: memory, (), bucket.num_bytes)
            await worker.load_weights(replace(bucket, buffer=shared))
            memory.fill_(77)
        await worker.finish_weight_update(60)

    asyncio.run(run())
    assert error_of(model, make_request(10), generate(worker, make_request(10))) < 2e-5


@pytest.mark.slow
def test_deepseek_v3_with_its_bias(worker: RolloutWorker, tmp_path: Path) -> None:
    asyncio.run(worker.shutdown())  # last user of the module's engine; a process runs one at a time
    folder = make_deepseek_v3(tmp_path)
    config = RolloutConfig(dtype="float32")
    other = RolloutWorker(str(folder), config, max_model_len=128, record_kept=True, record_routing=True)
    try:
        model = load_reference(folder)
        perturb(model, seed=1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.linspace(-0.1, 0.1, len(buffer)))
        asyncio.run(send(other, checkpoint(model), 1, max_bytes=100_000))
        request = make_request(1, 60)
        result = compare(model, request, generate(other, request))
        assert np.abs(result.logprob_diff).max() < 2e-5
        assert result.kept_agrees.all() and result.routes_agree.all()
    finally:
        asyncio.run(other.shutdown())
