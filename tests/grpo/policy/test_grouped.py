"""The experts' weight gradients without a GPU: through Triton's interpreter against float64, and compiled for an H100.

Triton reads TRITON_INTERPRET when it is imported, so each half runs in a process of its own: this file run as a module
with the half's name.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

from tests.triton_process import Halves, run_halves

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

CASES: dict[str, tuple[list[int], int, int]] = {
    "mixed": ([0, 1, 16, 17, 0, 40, 31, 0], 40, 24),
    "one expert": ([21], 16, 16),
    "only the last": ([0, 0, 5], 8, 56),
}
"""Rows of each expert, widths of both sides; blocks are of 16."""


def _errors(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Largest differences from float64, in units of the largest entry: written, then added to what was there."""
    from grpo.policy.layers import grouped

    sizes, width, other = CASES[name]
    generator, num_rows = torch.Generator().manual_seed(5), sum(sizes)
    left = torch.randn(num_rows, width, generator=generator).to(dtype)
    right = torch.randn(num_rows, other, generator=generator).to(dtype)
    ends = torch.tensor(sizes).cumsum(0).int()
    pairs = zip(left.double().split(sizes), right.double().split(sizes), strict=True)
    want = torch.stack([x.T @ y for x, y in pairs])
    written = torch.full_like(want, torch.nan, dtype=torch.float32)
    grouped.weight_grad(written, left, right, ends, add=False)
    before = torch.randn(want.shape, generator=generator)
    added = before.clone()
    grouped.weight_grad(added, left, right, ends, add=True)
    untouched = [expert for expert, size in enumerate(sizes) if not size]
    return {
        "written": float((written - want).abs().max() / want.abs().max()),
        "added": float((added - before - want).abs().max() / want.abs().max()),
        "experts without rows": float((added - before)[untouched].abs().sum() + written[untouched].abs().sum()),
    }


def interpret() -> dict[str, dict[str, float]]:
    """All errors, with tiles so small that every expert needs several."""
    from grpo.policy.layers import grouped

    grouped.TILE = grouped.TILE._replace(height=16, width=16, depth=16)
    return {f"{name} {dtype}": _errors(name, dtype) for name in CASES for dtype in (torch.float32, torch.float16)}


def compile_kernels() -> dict[str, int]:
    """Shared memory in bytes for compute capability 9.0 at Qwen3-30B-A3B's widths: written, and added."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from grpo.policy.layers import grouped

    kernel, tile, used = grouped.weight_grad_kernel, grouped.TILE, {}
    types = {
        **dict.fromkeys(("LEFT", "RIGHT"), "*bf16"),
        "LEFT_BLOCKS": f"tensordesc<bf16[{tile.depth},{tile.height}]>",
        "RIGHT_BLOCKS": f"tensordesc<bf16[{tile.depth},{tile.width}]>",
        **{"TOTAL": "*fp32", "ENDS": "*i32"},
    }
    for add in (False, True):
        constants = {"M": 1536, "N": 2048, "HEIGHT": tile.height, "WIDTH": tile.width, "DEPTH": tile.depth, "ADD": add}
        source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        used[f"add {add}"] = compiled.metadata.shared
    return used


@pytest.fixture(scope="module")
def halves() -> Halves:
    return run_halves(__name__)


def test_interpreted_kernel_equals_float64(halves: Halves) -> None:
    assert len(halves.interpreted) == 2 * len(CASES)
    for name, errors in halves.interpreted.items():
        assert errors.pop("experts without rows") == 0, name
        assert errors and {key: error for key, error in errors.items() if not error < 1e-6} == {}, name


def test_the_kernel_compiles_for_an_h100_and_two_programs_fit_a_multiprocessor(halves: Halves) -> None:
    used = halves.compiled
    assert len(used) == 2 and 2 * (max(used.values()) + 1024) <= 228 * 1024


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile_kernels": compile_kernels}[sys.argv[1]]()))
