"""An engine that sleeps or is shut down gives its GPU memory back; after sleep and an update it answers as before."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
pytest.importorskip("vllm")

from rollout.config import RolloutConfig  # noqa: E402
from rollout.types import Completion, GenerateRequest  # noqa: E402
from rollout.weight_sync import pack_buckets  # noqa: E402
from rollout.worker import RolloutWorker  # noqa: E402
from tests.tiny_models import make_qwen3_moe  # noqa: E402

KV_CACHE_GIB = 2.0


def test_sleep_frees_the_memory_and_updates_bring_the_engine_back(tmp_path: Path) -> None:
    """The first update goes through vLLM's loaders, the second into tensors whose places the first has shown."""
    folder = make_qwen3_moe(tmp_path, dtype=torch.bfloat16)
    config = RolloutConfig(
        enforce_eager=True, sleep_while_training=True, kv_cache_gib=KV_CACHE_GIB, gpu_memory_fraction=0.3
    )
    worker = RolloutWorker(str(folder), config, max_model_len=256, record_kept=True, record_routing=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda")
    requests = [GenerateRequest(np.arange(3, 40, dtype=np.int32), (seed,), 1.0, 0.9, 0, 50, ()) for seed in range(4)]

    async def wake(version: int) -> tuple[list[Completion], int]:
        free = torch.cuda.mem_get_info()[0]
        await worker.sleep()
        freed = torch.cuda.mem_get_info()[0] - free
        late = [asyncio.ensure_future(worker.generate(request)) for request in requests]
        await asyncio.sleep(0.2)
        assert not any(call.done() for call in late)
        await worker.begin_weight_update()
        tensors = revert_weight_conversion(model, model.state_dict()).items()  # as the learner sends them
        for bucket in pack_buckets(tensors, max_bytes=1 << 20):
            await worker.load_weights(bucket)
        await worker.finish_weight_update(version)
        return [(await call)[0] for call in late], freed

    async def run() -> tuple[list[Completion], list[tuple[list[Completion], int]], set[str]]:
        before = [(await worker.generate(request))[0] for request in requests]
        return before, [await wake(version) for version in (1, 2)], set((await worker._engine._ask(directly_loaded))[0])

    def directly_loaded() -> list[list[str]]:
        llm = worker._engine._llm
        return llm.collective_rpc(lambda wrapper: list(wrapper.worker.weight_transfer_engine._direct._layers))

    try:
        before, cycles, direct = asyncio.run(run())
    finally:
        asyncio.run(worker.shutdown())
    for version, (after, freed) in enumerate(cycles, start=1):
        assert freed > 0.9 * KV_CACHE_GIB * 2**30
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(old.token_ids, new.token_ids)
            np.testing.assert_allclose(old.behavior_logprobs, new.behavior_logprobs, atol=0.05)
            assert (new.policy_versions == version).all()
    # The vocabulary of 99 ids is padded; embedding and head stay with vLLM.
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "input_layernorm", "mlp.gate", "mlp.experts.routed_experts")
    assert {f"model.layers.{layer}.{part}" for layer in range(3) for part in parts} <= direct


def test_shutdown_gives_the_memory_back(tmp_path: Path) -> None:
    """Twice, so that what CUDA loads once per process (its context, kernels, workspaces) is told from what leaks."""
    folder = make_qwen3_moe(tmp_path, dtype=torch.bfloat16)
    config = RolloutConfig(enforce_eager=True, kv_cache_gib=KV_CACHE_GIB, gpu_memory_fraction=0.3)
    request = GenerateRequest(np.arange(3, 40, dtype=np.int32), (1,), 1.0, 0.9, 0, 50, ())

    def free_memory() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    async def use() -> int:
        worker = RolloutWorker(str(folder), config, max_model_len=256, record_kept=True, record_routing=True)
        try:
            await worker.generate(request)
            return free_memory()
        finally:
            await worker.shutdown()

    held = asyncio.run(use())
    first = free_memory()
    asyncio.run(use())
    second = free_memory()
    assert first - held > 0.9 * KV_CACHE_GIB * 2**30
    assert abs(first - second) < 64 * 2**20
