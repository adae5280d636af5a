"""What a step leaves on a CPU: log-probabilities and supports against the definition in float64, and routes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from rollout.vllm_plugin.support import RouteBuffers, pack_on_cpu
from tests.rollout.packed_steps import read_logprobs, read_routes, read_sets

VOCAB_SIZE = 12_345
Case = tuple[Tensor, Tensor, Tensor, np.ndarray]
"""The first arguments of `pack_on_cpu`."""


def make_case(sizes: list[int], *, num_sampled: list[int] | None = None, truncates: list[int] | None = None) -> Case:
    """Rows with supports of these sizes, scattered over the vocabulary; the likeliest id is not always the sampled."""
    generator = torch.Generator().manual_seed(len(sizes))
    logits = torch.full((len(sizes), VOCAB_SIZE), -torch.inf)
    sampled = torch.zeros(len(sizes), dtype=torch.int64)
    for row, size in enumerate(sizes):
        ids = torch.randperm(VOCAB_SIZE, generator=generator)[:size]
        logits[row, ids] = 20 * torch.randn(size, generator=generator)
        sampled[row] = ids[0]
    ones = [1] * len(sizes)
    return logits, sampled, torch.tensor(num_sampled or ones).int(), np.array(truncates or ones, bool)


CASES: dict[str, Callable[[], Case]] = {
    "mixed sizes": lambda: make_case([1, 40, 7, 300, 2]),
    "rows that do not truncate": lambda: make_case([5, VOCAB_SIZE, 3], truncates=[1, 0, 1]),
    "rows that sample nothing": lambda: make_case([5, 9, 3], num_sampled=[1, 0, 1]),
}


@pytest.mark.parametrize("name", CASES)
def test_supports_and_logprobs(name: str) -> None:
    logits, sampled, num_sampled, truncates = CASES[name]()
    step = pack_on_cpu(logits, sampled, num_sampled, truncates, 0, None).tolists()
    exact = logits.double().log_softmax(-1).gather(-1, sampled[:, None])[:, 0]
    np.testing.assert_allclose(read_logprobs(step, len(exact)), exact, atol=1e-5)
    sets = read_sets(step, len(exact))
    assert sets is not None
    recorded = truncates & (num_sampled.numpy() > 0)
    rows = [sets.ids[start : start + size] for start, size in zip(sets.starts, sets.sizes, strict=True)]
    for row, line, is_recorded in zip(rows, logits.numpy(), recorded, strict=True):
        np.testing.assert_array_equal(row, np.flatnonzero(np.isfinite(line)) if is_recorded else [])


def make_buffers(num_experts: int) -> RouteBuffers:
    """Of at most 40 tokens; 3 layers, 5 experts per token."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(0, 2**40, (40,), generator=generator)
    ids = torch.randint(0, num_experts, (40, 3, 5), generator=generator).int()
    return RouteBuffers(slots, ids, np.dtype(np.uint8 if num_experts <= 256 else np.uint16))


@pytest.mark.parametrize("num_experts", [200, 300])
@pytest.mark.parametrize("num_tokens", [1, 3, 7, 40])
def test_routes(num_experts: int, num_tokens: int) -> None:
    buffers = make_buffers(num_experts)
    step = pack_on_cpu(*make_case([4, 1500, 6]), num_tokens, buffers).tolists()
    slots, routes = read_routes(step)
    assert routes.dtype == buffers.dtype
    np.testing.assert_array_equal(slots, buffers.slots[:num_tokens])
    np.testing.assert_array_equal(routes, buffers.ids[:num_tokens])
    sets = read_sets(step, 3)
    assert sets is not None and sets.sizes.tolist() == [4, 1500, 6]


def test_nothing_to_record() -> None:
    logits, sampled, num_sampled, _ = make_case([3, 4])
    step = pack_on_cpu(logits, sampled, num_sampled, None, 0, None).tolists()
    assert read_sets(step, 2) is None
    np.testing.assert_allclose(
        read_logprobs(step, 2), logits.log_softmax(-1).gather(-1, sampled[:, None])[:, 0], atol=1e-5
    )
