"""AdamW's kernel on a GPU: the optimizer against float64, and through a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.grpo.test_adamw import SIZES, check_checkpoint, check_steps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("size", SIZES)
def test_steps_equal_float64(size: int) -> None:
    check_steps(size, "cuda")


def test_a_checkpoint_continues_bit_equal(tmp_path: Path) -> None:
    check_checkpoint(2500, "cuda", tmp_path)
