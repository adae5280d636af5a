"""The sampler on a GPU: its kernels against vLLM's and float64, and an engine short of room against transformers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rollout.vllm_plugin.draw import Rows
from rollout.vllm_plugin.launch import Launcher
from tests.rollout.test_draw import ROUTES, check, compare, draws_routes, make_drawer, make_rows, read

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCAB_SIZE = 100_003  # ten chunks of a row, the last one not full


def test_draws() -> None:
    pytest.importorskip("vllm")
    check(compare(torch.device("cuda"), VOCAB_SIZE))


@pytest.mark.parametrize(("num_experts", "num_tokens", "records"), ROUTES)
def test_routes(num_experts: int, num_tokens: int, records: bool) -> None:
    pytest.importorskip("vllm")
    assert draws_routes(torch.device("cuda"), VOCAB_SIZE, num_experts, num_tokens, records=records)


def lay_logits(logits: Tensor, kind: str) -> Tensor:
    """The same values elsewhere in memory, or in another dtype."""
    num_rows, vocab_size = logits.shape
    if kind == "aligned":
        return logits.cuda()
    if kind == "rows at multiples of 64 bytes":
        wide = torch.empty(num_rows, -(-vocab_size // 16) * 16, device="cuda")
        wide[:, :vocab_size] = logits
        return wide[:, :vocab_size]
    if kind == "bfloat16":
        return logits.cuda().bfloat16()
    store = torch.empty(logits.numel() + 1, device="cuda")
    store[1:] = logits.flatten()
    return store[1:].view(logits.shape)


def move(tensor: Tensor) -> Tensor:
    """The same values at an address that is no multiple of 16 bytes."""
    store = torch.empty(len(tensor) + 1, dtype=tensor.dtype, device="cuda")
    store[1:] = tensor
    return store[1:]


def test_launches_of_what_is_compiled() -> None:
    """One drawer's second launch of each kind, and third, draws and records as the first of a drawer of its own."""
    pytest.importorskip("vllm")
    rows, settings = make_rows(VOCAB_SIZE)
    device, kinds = torch.device("cuda"), ("aligned", "misaligned", "rows at multiples of 64 bytes", "bfloat16")
    drawer = make_drawer(settings, VOCAB_SIZE, device)
    logits = {kind: lay_logits(rows.logits, kind) for kind in kinds}
    assert logits["aligned"].data_ptr() % 16 == 0 and logits["misaligned"].data_ptr() % 16
    for kind in kinds * 3:
        for place in (Tensor.cuda, move):
            there = Rows(logits[kind], *(place(tensor) for tensor in rows[1:]))
            tokens, step = drawer(there, 0, truncates=True, records=True)
            wanted, step_wanted = make_drawer(settings, VOCAB_SIZE, device)(there, 0, truncates=True, records=True)
            record, record_wanted = read(step), read(step_wanted)
            assert torch.equal(tokens, wanted) and np.array_equal(record.logprobs, record_wanted.logprobs)
            assert all(map(np.array_equal, record.supports, record_wanted.supports))
    assert [len(launcher._compiled) for launcher in (drawer._guess, drawer._scan, drawer._draws[1])] == [len(kinds)] * 3


def test_a_specialised_argument_is_refused() -> None:
    pytest.importorskip("vllm")
    rows, settings = make_rows(VOCAB_SIZE)
    drawer = make_drawer(settings, VOCAB_SIZE, torch.device("cuda"))
    guess = drawer._guess
    careless = Launcher(guess._kernel, guess._stays, guess._constants, ())
    logits, slots = rows.logits.cuda(), rows.slots.cuda()
    with pytest.raises(TypeError, match="specialised by logits_ptr"):
        careless((1, 1, 1), 0, (logits, slots), (logits.stride(0),))


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
