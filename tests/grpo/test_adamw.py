"""AdamW against float64: torch's on a CPU with scaled gradients, and the kernel through Triton's interpreter, which is
compiled for an H100 as well.

Triton reads TRITON_INTERPRET when it is imported, so each half runs in a process of its own: this file run as a module
with the half's name.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grpo.adamw import ScalingAdamW, learning_rate
from grpo.checkpoint import load_training_state, save_training_state
from grpo.config import LearnerConfig
from tests.triton_process import Halves, run_halves

CONFIG = LearnerConfig(lr=3e-3, adam_beta1=0.9, adam_beta2=0.999, weight_decay=0.1)
SIZES = (1, 1024, 2500, 0)
SCALES = (1.0, 0.013, 0.5, 1.0, 1e-4)
EPS = 1e-8


class State(NamedTuple):
    weight: Tensor
    mean: Tensor
    square: Tensor


def gradients_of(size: int) -> list[Tensor]:
    """One per step, with entries from tiny to large."""
    generator = torch.Generator().manual_seed(size)
    spread = torch.randn(size, generator=generator).mul(3).exp()
    return [torch.randn(size, generator=generator) * spread for _ in SCALES]


def first_weight(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size + 1))


def reference(size: int) -> State:
    """Algorithm 2 of Loshchilov and Hutter (2019) in float64."""
    weight, mean, square = first_weight(size).double(), torch.zeros(size).double(), torch.zeros(size).double()
    beta1, beta2 = CONFIG.adam_beta1, CONFIG.adam_beta2
    for step, (gradient, scale) in enumerate(zip(gradients_of(size), SCALES, strict=True), start=1):
        g = gradient.double() * scale
        mean, square = beta1 * mean + (1 - beta1) * g, beta2 * square + (1 - beta2) * g * g
        direction = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + EPS)
        weight = weight - CONFIG.lr * (direction + CONFIG.weight_decay * weight)
    return State(weight, mean, square)


def errors_of(got: State, want: State) -> dict[str, float]:
    """Largest error of the weight, in steps of the learning rate, and of the moments, relative to each entry."""
    if not want.weight.numel():
        return {}
    return {
        "weight": float((got.weight.double() - want.weight).abs().max() / CONFIG.lr),
        "mean": float(((got.mean.double() - want.mean).abs() / want.square.sqrt()).max()),
        "square": float((got.square.double() / want.square - 1).abs().max()),
    }


def run_optimizer(size: int, device: str, after: Callable[[ScalingAdamW, int], ScalingAdamW]) -> State:
    """All steps by the optimizer; `after` may replace it after each."""
    weight = nn.Parameter(first_weight(size).to(device))
    optimizer = ScalingAdamW([weight], CONFIG)
    for step, (gradient, scale) in enumerate(zip(gradients_of(size), SCALES, strict=True), start=1):
        optimizer.param_groups[0]["params"][0].grad = gradient.to(device)
        optimizer.step_scaled(scale)
        optimizer = after(optimizer, step)
    (weight,) = optimizer.param_groups[0]["params"]
    state = optimizer.state[weight]
    return State(*(t.detach().cpu() for t in (weight, state["exp_avg"], state["exp_avg_sq"])))


def run_through_a_checkpoint(size: int, device: str, folder: Path) -> State:
    """All steps, with another optimizer of another parameter from the third on, which a checkpoint is read into."""

    def module_of(weight: nn.Parameter) -> nn.Module:
        module = nn.Module()
        module.register_parameter("weight", weight)
        return module

    def reload(optimizer: ScalingAdamW, step: int) -> ScalingAdamW:
        if step != 2:
            return optimizer
        (weight,) = optimizer.param_groups[0]["params"]
        counters = {"policy_version": 2, "num_updates": 2}
        save_training_state(folder, module_of(weight), optimizer, counters)
        fresh = nn.Parameter(torch.zeros_like(weight))
        again = ScalingAdamW([fresh], CONFIG)
        assert load_training_state(folder, module_of(fresh), again) == counters
        return again

    return run_optimizer(size, device, reload)


def check_steps(size: int, device: str) -> None:
    check(errors_of(run_optimizer(size, device, lambda optimizer, _: optimizer), reference(size)))


def check_checkpoint(size: int, device: str, folder: Path) -> None:
    straight = run_optimizer(size, device, lambda optimizer, _: optimizer)
    for a, b in zip(straight, run_through_a_checkpoint(size, device, folder), strict=True):
        assert torch.equal(a, b)


def interpret() -> dict[str, dict[str, float]]:
    """The kernel's errors by size."""
    from grpo.adamw_kernel import adamw_step

    found = {}
    for size in SIZES:
        state = State(first_weight(size), torch.zeros(size), torch.zeros(size))
        for step, (gradient, scale) in enumerate(zip(gradients_of(size), SCALES, strict=True), start=1):
            adamw_step(
                state.weight,
                gradient,
                state.mean,
                state.square,
                step=step,
                lr=CONFIG.lr,
                betas=(CONFIG.adam_beta1, CONFIG.adam_beta2),
                eps=EPS,
                weight_decay=CONFIG.weight_decay,
                scale=scale,
            )
        found[str(size)] = errors_of(state, reference(size))
    return found


def compile_kernels() -> int:
    """Size in bytes of the kernel's machine code for compute capability 9.0."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from grpo.adamw_kernel import BLOCK, adamw_kernel

    names = adamw_kernel.arg_names
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" if name == "num_elements" else "fp32" for name in names}
    source = ASTSource(adamw_kernel, types | {"BLOCK": "constexpr"}, constexprs={"BLOCK": BLOCK})
    return len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"])


def check(errors: dict[str, float]) -> None:
    bounds = {"weight": 5e-4, "mean": 2e-6, "square": 2e-6}
    assert {key: error for key, error in errors.items() if not error < bounds[key]} == {}


@pytest.mark.parametrize("size", SIZES)
def test_steps_on_a_cpu_equal_float64(size: int) -> None:
    check_steps(size, "cpu")


def test_a_checkpoint_continues_bit_equal(tmp_path: Path) -> None:
    check_checkpoint(1024, "cpu", tmp_path)


@pytest.fixture(scope="module")
def halves() -> Halves:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    return run_halves(__name__)


def test_the_interpreted_kernel_equals_float64(halves: Halves) -> None:
    assert halves.interpreted.keys() == {str(size) for size in SIZES}
    for errors in halves.interpreted.values():
        check(errors)


def test_the_kernel_compiles_for_an_h100(halves: Halves) -> None:
    assert halves.compiled > 1000


def test_learning_rate_schedules():
    constant = LearnerConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(constant, i, 10) for i in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    cosine = LearnerConfig(lr=2.0, schedule="cosine", warmup_steps=2)
    values = [learning_rate(cosine, i, 12) for i in range(13)]
    assert values[2] == 2.0 and values[7] == pytest.approx(1.0) and values[12] == pytest.approx(0.0)
    assert np.all(np.diff(values[2:]) < 0)


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile_kernels": compile_kernels}[sys.argv[1]]()))
