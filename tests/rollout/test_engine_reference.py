"""The reference of the engine's records is strict, but for what rounding decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout.types import GenerateRequest
from tests.rollout.engine_reference import TIE, _same_kept

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.2, 0.2, 0.05])
NEARLY = TIE / 10


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept", "same"),
    [
        (0.75, 0, {1, 3, 4}, True),
        (0.75, 0, {1, 3}, False),
        (0.75, 0, {1, 3, 4, 0}, False),
        (0.5, 0, {1, 3}, True),  # 3 and 4 are equally likely: either
        (0.5, 0, {1, 4}, True),
        (0.5, 0, {1, 0}, False),
        (0.5, 0, {3, 4}, False),
        (0.8 + NEARLY, 0, {1, 3, 4}, True),  # 0 is at the edge: in or out
        (0.8 + NEARLY, 0, {1, 3, 4, 0}, True),
        (0.8 - NEARLY, 0, {1, 3, 4, 0}, True),
        (0.8 + 2 * TIE, 0, {1, 3, 4}, False),
        (0.8 - 2 * TIE, 0, {1, 3, 4, 0}, False),
        (1.0, 2, {1, 3}, True),
        (1.0, 2, {1, 4}, True),
        (1.0, 2, {1, 3, 0}, False),
        (0.6, 2, {1}, True),  # of 0.6 that are left, 0.4 is two thirds
        (0.6, 2, {1, 3}, False),
        (1.0, 0, {0, 1, 2, 3, 4, 5}, True),
        (1.0, 0, {0, 1, 3, 4, 5}, False),
        (1e-3, 0, {1}, True),
        (1e-3, 0, set(), False),
    ],
)
def test_kept_sets(top_p: float, top_k: int, kept: set[int], same: bool) -> None:
    request = GenerateRequest(np.array([3], np.int32), (0,), 1.0, top_p, top_k, 1, ())
    assert _same_kept(PROBABILITIES.log(), torch.tensor(sorted(kept), dtype=torch.long), request) is same
