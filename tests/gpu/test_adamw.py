"""AdamW's kernel on a GPU: the optimizer against float64, and through a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.grpo.test_adamw import SIZES, check, errors_of, reference, run_optimizer, run_through_a_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("size", SIZES)
def test_steps_equal_float64(size: int) -> None:
    check(errors_of(run_optimizer(size, "cuda", lambda optimizer, _: optimizer), reference(size)))


def test_a_checkpoint_continues_bit_equal(tmp_path: Path) -> None:
    straight = run_optimizer(2500, "cuda", lambda optimizer, _: optimizer)
    for a, b in zip(straight, run_through_a_checkpoint(2500, "cuda", tmp_path), strict=True):
        assert torch.equal(a, b)
