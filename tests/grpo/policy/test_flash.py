"""The attention kernels without a GPU: through Triton's interpreter against a dense mask, and compiled for an H100.

Triton reads TRITON_INTERPRET when it is imported, so each half runs in a process of its own: this file run as a module
with the half's name.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys

import pytest
import torch

from tests.triton_process import run_half

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

CASES: dict[str, tuple[list[int], int, int]] = {
    "grouped": ([37, 1, 66], 4, 2),
    "one head": ([33], 1, 1),
    "eight to one": ([20, 17], 8, 1),
}
"""Sequence lengths, query heads, key heads."""
PARENTS: dict[str, list[int]] = {
    "prompt of several blocks": [-1, 0, 0, 0],
    "prompt and branches of one": [-1, -1, 0, 0, 1, 1],
    "prompts beside a whole sequence": [-1, -1, -1, 0, 0, 1, 1, 1],
    "runs of children": [-1, -1, 0, 0, 0, 0, 0, 0, 1, 1, 1],
}
"""The sequence each goes on from, in rows that have such sequences."""
CASES |= {
    "prompt of several blocks": ([70, 33, 1, 40], 2, 1),
    "prompt and branches of one": ([1, 32, 37, 1, 64, 1], 2, 1),
    "prompts beside a whole sequence": ([17, 48, 20, 35, 3, 16, 66, 1], 2, 1),
    "runs of children": ([35, 20, 5, 6, 17, 8, 20, 3, 34, 1, 2], 2, 2),
}
WIDTH = 16
TREE = ("TREE", "KEY_PARTS", "VALUE_PARTS")
"""What is None in rows without parents."""


def _errors(name: str) -> list[float]:
    """Largest differences of the output and the three gradients from attention under a mask in float64."""
    from grpo.policy.layers.attention import PackedLayout
    from grpo.policy.layers.flash import flash_attention

    lengths, heads, key_heads = CASES[name]
    parents = torch.tensor(PARENTS.get(name, [-1] * len(lengths)), dtype=torch.int32)
    generator, total = torch.Generator().manual_seed(3), sum(lengths)
    states = [torch.randn(total, n, WIDTH, generator=generator).requires_grad_() for n in (heads, key_heads, key_heads)]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    query, key, value = states
    layout = PackedLayout(cu_seqlens, max(lengths), parents if name in PARENTS else None)
    got = flash_attention(query, key, value, cu_seqlens, max(lengths), 0.3, layout.tree)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (owner[:, None] == owner) & torch.ones(total, total).tril().bool()
    allowed |= parents[owner][:, None] == owner
    q, k, v = (
        x.double().transpose(0, 1) for x in (query, *(s.repeat_interleave(heads // key_heads, 1) for s in states[1:]))
    )
    want = ((q @ k.mT * 0.3).masked_fill(~allowed, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    upstream = torch.randn(got.shape, generator=generator)
    got_all = (got, *torch.autograd.grad(got, states, upstream))
    want_all = (want, *torch.autograd.grad(want, states, upstream.double()))
    return [float((a - b).detach().abs().max()) for a, b in zip(got_all, want_all, strict=True)]


def interpret() -> dict[str, list[float]]:
    """All errors, with programs so small that every sequence needs several."""
    from grpo.policy.layers import flash

    flash.FORWARD = flash.QUERY_GRAD = flash.Tile(32, 16, 4, 1)
    flash.KEY_VALUE_GRAD = flash.Tile(16, 32, 4, 1)
    return {name: _errors(name) for name in CASES}


def compile_kernels() -> dict[str, int]:
    """Shared memory in bytes of every kernel for compute capability 9.0, at 32 query heads of 128 on 4 key heads, for
    rows with parents and without."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from grpo.policy.layers import flash, flash_kernels

    def kind(name: str, tile: flash.Tile) -> str:
        if name.endswith("_BLOCKS"):
            rows = tile.columns if name in ("KEY_BLOCKS", "VALUE_BLOCKS") else tile.rows
            return f"tensordesc<bf16[{rows},128]>"
        special = {
            "LSE": "*fp32", "DELTA": "*fp32", "KEY_PARTS": "*fp32", "VALUE_PARTS": "*fp32",
            "CU": "*i32", "TREE": "*i32", "scale": "fp32", "stride": "i32",
        }  # fmt: skip
        return special.get(name, "*bf16")

    used = {}
    tiles = {
        flash_kernels.forward_kernel: flash.FORWARD,
        flash_kernels.key_value_grad_kernel: flash.KEY_VALUE_GRAD,
        flash_kernels.run_grad_kernel: flash.KEY_VALUE_GRAD,
        flash_kernels.query_grad_kernel: flash.QUERY_GRAD,
        flash_kernels.delta_kernel: flash.Tile(0, 0, 4, 1),
    }
    for (kernel, tile), without in itertools.product(tiles.items(), (dict.fromkeys(TREE), {})):
        if without and kernel is flash_kernels.run_grad_kernel:
            continue
        constants = {"H": 32, "GROUP": 8, "D": 128, "PAD": flash.PAD, "ROWS": tile.rows, "COLUMNS": tile.columns}
        constants |= without
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        types = {name: "constexpr" if name in constants else kind(name, tile) for name in kernel.arg_names}
        source = ASTSource(kernel, types, constexprs=constants)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        used[f"{kernel.__name__}, {'no' if without else 'with'} parents"] = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options=options
        ).metadata.shared
    return used


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[float]]:
    return run_half(__name__, "interpret", interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_equal_a_dense_mask(interpreted: dict[str, list[float]], name: str) -> None:
    assert len(interpreted[name]) == 4 and all(error < 5e-6 for error in interpreted[name])


def test_every_kernel_compiles_for_an_h100_and_fits_its_shared_memory() -> None:
    used = run_half(__name__, "compile_kernels", interpret=False)
    assert len(used) == 9 and max(used.values()) <= 227 * 1024


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile_kernels": compile_kernels}[sys.argv[1]]()))
