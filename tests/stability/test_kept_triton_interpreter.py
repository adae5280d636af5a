"""The GPU kernels without a GPU: through Triton's interpreter against float64, and compiled for an H100.

Triton reads TRITON_INTERPRET when it is imported and then compiles nothing, so each half runs in a process of its own:
this file run as a module with the half's name.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.triton_process import Halves, run_halves

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

WIDEST = 20
SIZES: dict[str, list[int]] = {
    "mixed": [1, 3, 7, 0, 12, 1, 20, 2, 21, 5] * 4,  # 0 and 21 belong to the dense path
    "singletons": [1] * 5,
    "dense": [0, 30],
    "empty": [],
}
WIDTHS = {"mixed": 40, "singletons": 16, "dense": 16, "empty": 16}
COMMON = 7
VOCAB_SIZE = 300


class Case(NamedTuple):
    """Arguments of `set_logprobs`."""

    hidden: Tensor
    weight: Tensor
    offsets: Tensor
    ids: Tensor
    targets: Tensor
    temperature: Tensor

    @property
    def sizes(self) -> Tensor:
        return self.offsets.diff()

    @property
    def gathered(self) -> Tensor:
        """bool [N], rows that the kernels answer for."""
        return (self.sizes > 0) & (self.sizes <= WIDEST)


def make_case(sizes: list[int], width: int, dtype: torch.dtype) -> Case:
    """Random sets; the id `COMMON` is in every one of more than one id, so its pairs fill several programs."""
    generator = torch.Generator().manual_seed(len(sizes))
    sets = [torch.randperm(VOCAB_SIZE, generator=generator)[:size] for size in sizes]
    for chosen in sets:
        if len(chosen) > 1 and COMMON not in chosen:
            chosen[-1] = COMMON
    targets = [int(s[torch.randint(len(s), (), generator=generator)]) if len(s) else 0 for s in sets]
    return Case(
        hidden=torch.randn(len(sizes), width, generator=generator).to(dtype).requires_grad_(),
        weight=torch.randn(VOCAB_SIZE, width, generator=generator).to(dtype).requires_grad_(),
        offsets=torch.tensor([0, *sizes]).cumsum(0),
        ids=torch.cat([*sets, torch.zeros(0, dtype=torch.int64)]),
        targets=torch.tensor(targets, dtype=torch.int64),
        temperature=0.5 + torch.rand(len(sizes), generator=generator),
    )


def exact(case: Case, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies (0 for dense rows) and gradients in float64, row by row."""
    hidden, weight = (m.detach().double().requires_grad_() for m in (case.hidden, case.weight))
    logprobs, entropy = torch.zeros(2, len(case.targets), dtype=torch.float64)
    total = (hidden.sum() + weight.sum()) * 0
    for row in case.gathered.nonzero()[:, 0].tolist():
        ids = case.ids[case.offsets[row] : case.offsets[row + 1]]
        log_p = ((weight[ids] @ hidden[row]) / case.temperature[row].double()).log_softmax(-1)
        logprob = log_p[ids == case.targets[row]][0]
        total = total + logprob * upstream[row]
        logprobs[row], entropy[row] = logprob.detach(), -(log_p.exp() * log_p).sum().detach()
    return logprobs, entropy, *torch.autograd.grad(total, (hidden, weight))  # pyright: ignore[reportReturnType]


def _largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max()) if difference.numel() else 0.0


def _interpreted(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Largest absolute differences of one case, and what the counts say."""
    from stability.kept_triton import Sets, set_logprobs

    case = make_case(SIZES[name], WIDTHS[name], dtype)
    sets = Sets(case.offsets, case.ids, case.sizes == 0, case.targets, case.temperature, WIDEST)
    upstream = torch.linspace(-1, 2, len(case.targets))
    upstream[::6] = 0
    logprobs, entropy, counts = set_logprobs(case.hidden, case.weight, sets)
    logprobs.backward(upstream)
    got = (logprobs, entropy, case.hidden.grad, case.weight.grad)
    want = exact(case, upstream)
    errors = [_largest(one - other) for one, other in zip(got, want, strict=True) if one is not None]
    accumulator = torch.ones(VOCAB_SIZE, case.hidden.shape[1])
    frozen = case.weight.detach()
    set_logprobs(case.hidden, frozen, sets._replace(ids=case.ids.int()), accumulator)[0].backward(upstream)
    broken = sets._replace(targets=torch.full_like(case.targets, VOCAB_SIZE))
    with torch.no_grad():
        missing = set_logprobs(case.hidden, case.weight, broken)[2].read()
    return {
        "errors": errors,
        "accumulated": _largest(accumulator - 1 - want[3]),
        "counts": counts.read(),
        "counts_of_broken": missing,
        "num_rows": [len(case.targets), int(case.gathered.sum())],
    }


def _dense_interpreted() -> dict[str, float]:
    """Largest absolute differences between the dense steps' kernels and their torch versions."""
    from stability import keep_sampling_mask, kept_triton

    case = make_case(SIZES["mixed"], 8, torch.float32)
    logits = torch.randn(len(case.targets), VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    rows = (case.offsets, case.ids, case.sizes == 0, case.targets, case.temperature)
    want = keep_sampling_mask._support_softmax(logits.double(), *rows)
    got = kept_triton.support_softmax(logits, *rows)
    errors = {str(i): _largest(one - other) for i, (one, other) in enumerate(zip(got, want, strict=True))}
    upstream = torch.linspace(-1, 2, len(case.targets))
    dz = keep_sampling_mask._support_logit_grad(logits.double(), *rows, want[1], upstream, dtype=torch.float64)
    errors["dz"] = _largest(kept_triton.support_logit_grad(logits, *rows, got[1], upstream, dtype=torch.float32) - dz)
    return errors


def interpret() -> dict[str, Any]:
    """Every case in both types; small programs, so that one id's pairs cross many of them."""
    from stability import kept_triton

    results: dict[str, Any] = {name: _interpreted(name, torch.float32) for name in SIZES}
    results["bfloat16"] = _interpreted("mixed", torch.bfloat16)
    kept_triton.MIN_PAIRS = kept_triton.MAX_PAIRS = 4
    kept_triton.JOIN = kept_triton.JOIN._replace(rows=4)
    results["small programs"] = _interpreted("mixed", torch.float32)
    results["dense steps"] = _dense_interpreted()
    return results


POINTERS = {
    **dict.fromkeys(("OFFSETS", "IDS", "TARGETS", "ORDER"), "*i64"),
    **dict.fromkeys(("KEYS", "ROWS", "SORTED_ROWS", "SLOTS", "COUNTS"), "*i32"),
    "UNTRUNCATED": "*i1",
}
"""Kernel parameters by name; the rest in capitals are float32, the rest in small letters int32."""


def compile_kernels() -> dict[str, int]:
    """Size in bytes of every kernel's machine code for compute capability 9.0, by kernel and type."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from stability import kept_kernels, kept_triton

    def size(kernel: Any, constants: dict[str, Any], matrix: str, warps: int) -> int:
        types = {n: "*fp32" if n.isupper() else "i32" for n in kernel.arg_names if n not in constants}
        types |= {n: t for n, t in POINTERS.items() if n in types}
        types |= {n: matrix for n in ("HIDDEN", "WEIGHT", "GRAD_HIDDEN") if n in types}
        source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        return len(compiled.asm["cubin"])

    sizes = {}
    for matrix in ("*bf16", "*fp32"):
        for kernel, constants, warps in _plan(kept_kernels, kept_triton):
            sizes[f"{matrix} {kernel.__name__} {constants}"] = size(kernel, constants, matrix, warps)
    return sizes


def _plan(kernels: Any, host: Any) -> Iterator[tuple[Any, dict[str, Any], int]]:
    """Kernel, compile-time constants and warps of every launch at width 2048."""
    wide, dense = {"WIDTH": 2048}, {"BLOCK": host.DENSE_BLOCK}
    weight = {**wide, "WIDTH_BLOCK": host.WEIGHT_GRAD.width}
    join = {**wide, "WIDTH_BLOCK": host.JOIN.width, "PARTS": host.JOIN.rows}
    hidden = {**wide, **_tile(host.HIDDEN_GRAD), "HIDDEN": True}
    check = {"ROWS_BLOCK": host.CHECK_ROWS, "IDS_BLOCK": host.CHECK_IDS}
    for flag in (True, False):
        yield kernels.check_kernel, {**check, "PAIRS": flag}, 4
        yield kernels.forward_kernel, {**wide, **_tile(host.FORWARD), "SAVE": flag}, host.FORWARD.warps
        yield kernels.hidden_grad_kernel, {**hidden, "PAIRS": flag}, host.HIDDEN_GRAD.warps
        yield kernels.weight_grad_kernel, {**weight, "ADD": flag}, host.WEIGHT_GRAD.warps
        yield kernels.join_kernel, {**join, "ADD": flag}, host.JOIN.warps
    yield kernels.order_kernel, {"BLOCK": host.ORDER_BLOCK}, 4
    yield kernels.support_softmax_kernel, dense, host.DENSE_WARPS
    yield kernels.support_logit_grad_kernel, dense, host.DENSE_WARPS


def _tile(tile: Any) -> dict[str, int]:
    return {"IDS_BLOCK": tile.rows, "WIDTH_BLOCK": tile.width}


@pytest.fixture(scope="module")
def halves() -> Halves:
    return run_halves(__name__)


@pytest.fixture
def interpreted(halves: Halves) -> dict[str, Any]:
    return halves.interpreted


@pytest.mark.parametrize("name", [*SIZES, "small programs"])
def test_interpreted_kernels_equal_float64(interpreted: dict[str, Any], name: str) -> None:
    assert all(error < 1e-5 for error in [*interpreted[name]["errors"], interpreted[name]["accumulated"]])


def test_bfloat16_inputs_are_summed_in_float32(interpreted: dict[str, Any]) -> None:
    """The accumulated gradient is float32; the other two are cut to bfloat16, by truncation in the interpreter."""
    logprobs, entropy, *gradients = interpreted["bfloat16"]["errors"]
    assert all(error < 1e-5 for error in (logprobs, entropy, interpreted["bfloat16"]["accumulated"]))
    assert all(error < 0.1 for error in gradients)


@pytest.mark.parametrize("name", SIZES)
def test_counts(interpreted: dict[str, Any], name: str) -> None:
    """Missing targets and dense rows; in the broken case no gathered row finds its target."""
    num_rows, num_gathered = interpreted[name]["num_rows"]
    assert interpreted[name]["counts"] == [0, num_rows - num_gathered]
    assert interpreted[name]["counts_of_broken"] == [num_gathered, num_rows - num_gathered]


def test_dense_steps_equal_their_torch_versions(interpreted: dict[str, Any]) -> None:
    assert all(error < 1e-5 for error in interpreted["dense steps"].values())


def test_every_kernel_compiles_for_an_h100(halves: Halves) -> None:
    assert len(halves.compiled) == 2 * (5 * 2 + 3) and min(halves.compiled.values()) > 1000


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile_kernels": compile_kernels}[sys.argv[1]]()))
