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
from rollout.vllm_plugin.support import StepSupports, SupportMeter
from tests.triton_process import run_half

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

VOCAB_SIZE = 12_345  # two chunks of a row, the second one not full
Case = tuple[Tensor, Tensor, Tensor, Tensor]
"""Arguments of a `SupportMeter`."""


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
    "a step without room": lambda: make_case([900, 850, 3]),
}


def errors_of(measure: Callable[..., StepSupports], case: Case) -> tuple[float, bool]:
    """Largest error of a log-probability, and whether every support is the ids of finite logit, in order."""
    logits, sampled, num_sampled, truncates = case
    sample = measure(*case).to_host().read()
    exact = logits.double().log_softmax(-1).gather(-1, sampled[:, None])[:, 0].numpy()
    assert sample.sets is not None
    rows = np.split(sample.sets.ids, np.cumsum(sample.sets.sizes)[:-1])
    recorded = ((truncates != 0) & (num_sampled > 0)).tolist()
    wanted = [
        np.flatnonzero(np.isfinite(row)) if kept else [] for row, kept in zip(logits.numpy(), recorded, strict=True)
    ]
    same = all(np.array_equal(row, want) for row, want in zip(rows, wanted, strict=True))
    return float(np.abs(sample.logprobs - exact).max()), same and sample.sets.ids.dtype == np.int32


def meter() -> SupportMeter:
    return SupportMeter(max_rows=8, vocab_size=VOCAB_SIZE, device=torch.device("cpu"))


@pytest.mark.parametrize("name", CASES)
def test_on_a_cpu(name: str) -> None:
    error, same = errors_of(meter(), CASES[name]())
    assert same and error < 1e-5


def test_nothing_to_record() -> None:
    logits, sampled, num_sampled, _ = make_case([3, 4])
    sample = meter()(logits, sampled, num_sampled, None).read()
    assert sample.sets is None
    np.testing.assert_allclose(sample.logprobs, logits.log_softmax(-1).gather(-1, sampled[:, None])[:, 0], atol=1e-5)


def interpret() -> dict[str, Any]:
    """Every case through the kernels, and the log-probabilities of a step that is not recorded."""
    gpu = meter()
    gpu._scratch = gpu._make_scratch(8, torch.device("cpu"))
    results: dict[str, Any] = {name: errors_of(gpu, make()) for name, make in CASES.items()}
    case = make_case([1, 40, VOCAB_SIZE])
    plain = gpu(*case[:3], None).read()
    exact = case[0].double().log_softmax(-1).gather(-1, case[1][:, None])[:, 0].numpy()
    results["not recorded"] = float(np.abs(plain.logprobs - exact).max()), plain.sets is None
    return results


def compile_kernels() -> dict[str, int]:
    """Size in bytes of the kernels' machine code for compute capability 9.0."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from rollout.vllm_plugin import support_kernels

    pointers = {"logits_ptr": "*fp32", "sums_ptr": "*fp32", "logprobs_ptr": "*fp32", "bits_ptr": "*u8"}
    sizes = {}
    for record in (True, False):
        constants: dict[str, dict[str, Any]] = {
            "scan_chunks": {"CHUNK": support._CHUNK, "BLOCK": support._BLOCK, "WIDTH": support._CHUNK_ROOM},
            "join_chunks": {"CHUNKS": 16, "WIDTH": support._CHUNK_ROOM},
        }
        for name, constant in constants.items():
            kernel = getattr(support_kernels, name)
            names = [n for n in kernel.arg_names if n not in (constant := {**constant, "RECORD": record})]
            types = {n: pointers.get(n, "*i32" if n.endswith("_ptr") else "i32") for n in names}
            types |= {n: "*i64" for n in ("sampled_ptr",) if n in types}
            source = ASTSource(kernel, {**types, **dict.fromkeys(constant, "constexpr")}, constexprs=constant)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            sizes[f"{name} {record}"] = len(compiled.asm["cubin"])
    return sizes


@needs_triton
def test_the_kernels_through_the_interpreter() -> None:
    results = run_half(__name__, "interpret", interpret=True)
    assert set(results) == {*CASES, "not recorded"}
    for name, (error, same) in results.items():
        assert same and error < 1e-5, name


@needs_triton
def test_the_kernels_compile_for_an_h100() -> None:
    sizes = run_half(__name__, "compile_kernels", interpret=False)
    assert len(sizes) == 4 and min(sizes.values()) > 1000


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile_kernels": compile_kernels}[sys.argv[1]]()))
