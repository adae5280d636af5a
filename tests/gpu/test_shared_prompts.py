"""Rows with shared prompts on a GPU: no further from float32 than rows that repeat them, the same bits at each run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from grpo.advantage import TrainSample
from grpo.batch import MicroBatch, TrainBatch, pack
from tests.gpu.test_learner_fast import make_policy, run
from tests.samples import make_group

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODELS = ("qwen3", "qwen3_moe", "mixtral")


def make_rows(name: str) -> list[list[TrainSample]]:
    """Two micro-batches of groups with prompts of 2 to 150 tokens, one group in both."""
    rng = np.random.default_rng(0)
    routes = None if name == "qwen3" else (3, 4, 16)
    sizes = ((150, [70, 1, 33, 64, 100, 9]), (2, [30, 60]), (65, [1, 2, 80]))
    groups = [
        make_group(rng, i, num_prompt=num_prompt, num_sampled=num_sampled, routes=routes)
        for i, (num_prompt, num_sampled) in enumerate(sizes)
    ]
    return [[*groups[0][:4], *groups[1]], [*groups[2], *groups[0][4:]]]


def packed(rows: Sequence[Sequence[TrainSample]], *, share: bool) -> list[TrainBatch]:
    batches = [pack(MicroBatch(tuple(row), (0.1,) * len(row)), share_prompts=share) for row in rows]
    assert all((batch.parents is not None) is share for batch in batches)
    return [batch.to(torch.device("cuda")) for batch in batches]


@pytest.mark.parametrize("name", MODELS)
def test_shared_is_as_near_to_float32_as_repeated(name: str) -> None:
    rows = make_rows(name)
    exact_logprobs, exact = run(make_policy(name, dtype=torch.float32), packed(rows, share=False))
    logprobs, shared = run(make_policy(name, dtype=torch.bfloat16), packed(rows, share=True))
    repeated_logprobs, repeated = run(make_policy(name, dtype=torch.bfloat16), packed(rows, share=False))
    assert (logprobs - exact_logprobs).abs().mean() < 1.3 * (repeated_logprobs - exact_logprobs).abs().mean()
    for key, want in exact.items():
        errors = [float((grads[key] - want).norm() / want.norm()) for grads in (shared, repeated)]
        assert errors[0] < max(1.5 * errors[1], 0.01), (key, errors)


@pytest.mark.parametrize("name", MODELS)
def test_shared_equals_repeated_in_float32(name: str) -> None:
    results = [run(make_policy(name, dtype=torch.float32), packed(make_rows(name), share=s)) for s in (False, True)]
    (want_logprobs, want), (logprobs, got) = results
    torch.testing.assert_close(logprobs, want_logprobs, rtol=0, atol=1e-5)
    for key, grad in want.items():
        assert float((got[key] - grad).norm() / grad.norm()) < 1e-4, key


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_two_runs_and_checkpointing_give_the_same_bits(name: str) -> None:
    batches = packed(make_rows(name), share=True)
    policy = make_policy(name, dtype=torch.bfloat16)
    first, second = run(policy, batches), run(policy, batches)
    checkpointed = run(make_policy(name, dtype=torch.bfloat16, checkpointing=True), batches)
    for other in (second, checkpointed):
        assert torch.equal(first[0], other[0])
        assert [key for key, grad in first[1].items() if not torch.equal(grad, other[1][key])] == []
