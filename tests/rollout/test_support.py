"""Log-probabilities and supports of a step: numpy's on a CPU, and the GPU kernels through Triton's interpreter, against
the definition in float64; the kernels compiled for an H100.

Triton reads TRITON_INTERPRET when it is imported and then compiles nothing, so each half runs in a process of its own:
this file run as a module with the half's name.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rollout.vllm_plugin import support
from rollout.vllm_plugin.support import PackedStep, RouteBuffers, StepPacker
from tests.triton_process import run_half

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

VOCAB_SIZE = 12_345  # two chunks of a row, the second one not full
Case = tuple[Tensor, Tensor, Tensor, Tensor]
"""Arguments of a `StepPacker`, but for the number of tokens."""


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
    return logits, sampled, torch.tensor(num_sampled or ones).int(), torch.tensor(truncates or ones).int()


CASES: dict[str, Callable[[], Case]] = {
    "mixed sizes": lambda: make_case([1, 40, 7, 300, 2]),
    "rows that do not truncate": lambda: make_case([5, VOCAB_SIZE, 3], truncates=[1, 0, 1]),
    "rows that sample nothing": lambda: make_case([5, 9, 3], num_sampled=[1, 0, 1]),
    "many ids": lambda: make_case([200, 300, 150]),
    "a chunk without room": lambda: make_case([4, 1500, 6]),
    "a step without room": lambda: make_case([700, 720, 680, 3]),
}


def errors_of(pack: Callable[..., PackedStep], case: Case) -> tuple[float, bool]:
    """Largest error of a log-probability, and whether every support is the ids of finite logit, in order."""
    logits, sampled, num_sampled, truncates = case
    step = pack(*case, 0).tolists()
    exact = logits.double().log_softmax(-1).gather(-1, sampled[:, None])[:, 0].numpy()
    assert step.sets is not None
    rows = np.split(step.sets.ids, np.cumsum(step.sets.sizes)[:-1])
    recorded = ((truncates != 0) & (num_sampled > 0)).tolist()
    wanted = [
        np.flatnonzero(np.isfinite(row)) if kept else [] for row, kept in zip(logits.numpy(), recorded, strict=True)
    ]
    same = all(np.array_equal(row, want) for row, want in zip(rows, wanted, strict=True))
    return float(np.abs(step.logprobs - exact).max()), same and step.sets.ids.dtype == np.int32


def make_packer(buffers: RouteBuffers | None = None) -> StepPacker:
    return StepPacker(max_rows=8, vocab_size=VOCAB_SIZE, device=torch.device("cpu"), buffers=buffers)


@pytest.mark.parametrize("name", CASES)
def test_on_a_cpu(name: str) -> None:
    error, same = errors_of(make_packer(), CASES[name]())
    assert same and error < 1e-5


def make_buffers(num_experts: int) -> RouteBuffers:
    """Of at most 40 tokens; 3 layers, 5 experts per token."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(0, 2**40, (40,), generator=generator)
    ids = torch.randint(0, num_experts, (40, 3, 5), generator=generator).int()
    return RouteBuffers(slots, ids, np.dtype(np.uint8 if num_experts <= 256 else np.uint16))


def packs_routes(pack: Callable[..., PackedStep], buffers: RouteBuffers, num_tokens: int) -> bool:
    """Whether routes and slots arrive, beside the rest."""
    step = pack(*make_case([4, 1500, 6]), num_tokens).tolists()
    assert step.routes is not None and step.routes.routes.dtype == buffers.dtype
    return (
        np.array_equal(step.routes.slots, buffers.slots[:num_tokens])
        and np.array_equal(step.routes.routes, buffers.ids[:num_tokens])
        and step.sets is not None
        and step.sets.sizes.tolist() == [4, 1500, 6]
    )


@pytest.mark.parametrize("num_experts", [200, 300])
@pytest.mark.parametrize("num_tokens", [1, 3, 7, 40])
def test_routes_on_a_cpu(num_experts: int, num_tokens: int) -> None:
    buffers = make_buffers(num_experts)
    assert packs_routes(make_packer(buffers), buffers, num_tokens)


def test_nothing_to_record() -> None:
    logits, sampled, num_sampled, _ = make_case([3, 4])
    step = make_packer()(logits, sampled, num_sampled, None, 0).tolists()
    assert step.sets is None
    np.testing.assert_allclose(step.logprobs, logits.log_softmax(-1).gather(-1, sampled[:, None])[:, 0], atol=1e-5)


def interpret() -> dict[str, Any]:
    """Every case through the kernels, the log-probabilities of a step that is not recorded, and routes."""
    packer = on_kernels(make_packer())
    results: dict[str, Any] = {name: errors_of(packer, make()) for name, make in CASES.items()}
    case = make_case([1, 40, VOCAB_SIZE])
    plain = packer(*case[:3], None, 0).tolists()
    exact = case[0].double().log_softmax(-1).gather(-1, case[1][:, None])[:, 0].numpy()
    results["not recorded"] = float(np.abs(plain.logprobs - exact).max()), plain.sets is None
    for num_experts in (200, 300):
        buffers = make_buffers(num_experts)
        same = [packs_routes(on_kernels(make_packer(buffers)), buffers, num_tokens) for num_tokens in (1, 3, 7, 40)]
        results[f"routes of {num_experts} experts"] = 0.0, all(same)
    return results


def on_kernels(packer: StepPacker) -> StepPacker:
    packer._scratch = packer._make_scratch(8, torch.device("cpu"))
    return packer


def compile_kernels() -> dict[str, int]:
    """Size in bytes of the kernels' machine code for compute capability 9.0."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from rollout.vllm_plugin import support_kernels

    pointers = dict.fromkeys(("logits_ptr", "sums_ptr"), "*fp32") | {"bits_ptr": "*u8"}
    pointers |= dict.fromkeys(("sampled_ptr", "slots_ptr"), "*i64")
    both = {"BLOCK": support._BLOCK, "WIDTH": support._CHUNK_ROOM}
    variants: list[tuple[str, dict[str, Any]]] = [
        (name, {**both, **own, "RECORD": record})
        for record in (True, False)
        for name, own in (
            ("scan_chunks", {"CHUNK": support._CHUNK}),
            ("finish_step", {"CHUNKS": 16, "ROUTE_BYTES": 0}),
            ("finish_step", {"CHUNKS": 16, "ROUTE_BYTES": 1}),
            ("finish_step", {"CHUNKS": 16, "ROUTE_BYTES": 2}),
        )
    ]
    sizes = {}
    for name, constants in variants:
        kernel = getattr(support_kernels, name)
        names = [n for n in kernel.arg_names if n not in constants]
        types = {n: pointers.get(n, "*i32" if n.endswith("_ptr") else "i32") for n in names}
        source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        sizes[f"{name} {constants}"] = len(compiled.asm["cubin"])
    return sizes


@needs_triton
def test_the_kernels_through_the_interpreter() -> None:
    results = run_half(__name__, "interpret", interpret=True)
    assert set(results) == {*CASES, "not recorded", "routes of 200 experts", "routes of 300 experts"}
    for name, (error, same) in results.items():
        assert same and error < 1e-5, name


@needs_triton
def test_the_kernels_compile_for_an_h100() -> None:
    sizes = run_half(__name__, "compile_kernels", interpret=False)
    assert len(sizes) == 8 and min(sizes.values()) > 1000


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile_kernels": compile_kernels}[sys.argv[1]]()))
