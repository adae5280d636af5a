"""AdamW's kernel on a GPU: the optimizer against float64, and through a checkpoint of its state as torch writes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grpo.adamw import ScalingAdamW
from tests.grpo.test_adamw import CONFIG, SIZES, check, errors_of, reference, run_optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("size", SIZES)
def test_steps_equal_float64(size: int) -> None:
    check(errors_of(run_optimizer(size, "cuda", lambda optimizer, _: optimizer), reference(size)))


def test_a_loaded_state_continues_bit_equal() -> None:
    def reload(optimizer: ScalingAdamW, step: int) -> ScalingAdamW:
        if step != 2:
            return optimizer
        (weight,) = optimizer.param_groups[0]["params"]
        fresh = ScalingAdamW([nn.Parameter(weight.detach().clone())], CONFIG)
        fresh.load_state_dict(optimizer.state_dict())
        return fresh

    straight = run_optimizer(2500, "cuda", lambda optimizer, _: optimizer)
    for a, b in zip(straight, run_optimizer(2500, "cuda", reload), strict=True):
        assert torch.equal(a, b)
