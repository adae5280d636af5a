"""The kernels of fused decoder layers without a GPU: through Triton's interpreter against the plain layer, and compiled
for an H100. Triton reads TRITON_INTERPRET when it is imported, so each half runs in a process of its own: this file run
as a module with the half's name.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.policy.layers.attention import PackedLayout, set_attention
from grpo.policy.layers.experts import _combine, _spread, _swiglu, _swiglu_grad
from tests.moe_models import build_model
from tests.triton_process import Halves, run_halves

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

LENGTHS = (5, 1, 7)
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_moe": {},
    "mixtral": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48},  # no norm in the heads
}


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def _layer_errors(name: str) -> dict[str, float]:
    """Relative errors of one layer's output and of every gradient, float32 kernels against the plain float32 layer."""
    from grpo.policy.layers import decoder

    model: Any = build_model(name, num_hidden_layers=1, **MODELS[name])
    set_attention(model, "packed")
    layer, generator = model.model.layers[0], torch.Generator().manual_seed(1)
    for norm in (p for key, p in layer.named_parameters() if "norm" in key):
        torch.nn.init.uniform_(norm, 0.5, 1.5, generator=generator)
    hidden = torch.randn(1, sum(LENGTHS), model.config.hidden_size, generator=generator).requires_grad_()
    upstream = torch.randn(hidden.shape, generator=generator)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    angles = model.model.rotary_emb(hidden, positions)
    layout = PackedLayout(torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32), max(LENGTHS))
    parameters = dict(layer.named_parameters())

    def results(out: Tensor) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(out, (hidden, *parameters.values()), upstream)
        return {"output": out.detach(), **dict(zip(("hidden", *parameters), gradients, strict=True))}

    plain = results(layer(hidden, position_embeddings=angles, position_ids=positions, packed_layout=layout))
    fused = results(decoder.fused_layer(layer, hidden[0], angles, layout)[None])
    return {key: _relative(fused[key], plain[key]) for key in plain}


def _stream_errors(name: str) -> dict[str, float]:
    """Relative errors of what a bfloat16 layer adds to a stream 256 times as large, and of the stream's gradient."""
    from grpo.policy.layers import decoder

    model: Any = build_model(name, num_hidden_layers=1, **MODELS[name]).bfloat16()
    set_attention(model, "packed")
    generator = torch.Generator().manual_seed(3)
    stream = (256 * torch.randn(sum(LENGTHS), model.config.hidden_size, generator=generator)).requires_grad_()
    upstream = torch.randn(stream.shape, generator=generator)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    angles = model.model.rotary_emb(stream[None].bfloat16(), positions)
    layout = PackedLayout(torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32), max(LENGTHS))
    fused = decoder.fused_layer(model.model.layers[0], stream, angles, layout)
    (fused_grad,) = torch.autograd.grad(fused, stream, upstream)
    exact = model.model.layers[0].float()(
        stream[None], position_embeddings=[a.float() for a in angles], position_ids=positions, packed_layout=layout
    )[0]
    (exact_grad,) = torch.autograd.grad(exact, stream, upstream)
    return {
        "added": _relative(fused.detach() - stream.detach(), exact.detach() - stream.detach()),
        "gradient added": _relative(fused_grad - upstream, exact_grad - upstream),
        "not float32": float(fused.dtype != torch.float32),
    }


def _expert_errors() -> dict[str, float]:
    """Relative errors of the kernels beside the experts' products against their torch versions."""
    from grpo.policy.layers import pointwise

    generator = torch.Generator().manual_seed(2)
    inner, grad = (torch.randn(12, n, generator=generator) for n in (2 * 20, 20))
    weights, rows = torch.rand(12, generator=generator), torch.randn(12, 24, generator=generator)
    slots = torch.randperm(12, generator=generator).view(4, 3)
    total = grad.clone()
    pointwise.accumulate(total, inner[:, :20].contiguous(), add=True)
    gate, up = inner.chunk(2, 1)
    inner_grad = torch.empty_like(inner)
    gate_grad, up_grad = inner_grad.chunk(2, 1)
    out, weights_grad = pointwise.swiglu_grad(gate, up, grad, gate_grad, up_grad, weights)
    want = _swiglu_grad(inner, grad, weights)
    return {
        "accumulate": _relative(total, grad + gate),
        "cast": _relative(pointwise.cast(grad, torch.float16).float(), grad.half().float()),
        "swiglu": _relative(pointwise.swiglu(gate, up), _swiglu(inner)),
        "inner grad": _relative(inner_grad, want[0]),
        "activation": _relative(out, want[1]),
        "weights grad": _relative(weights_grad, want[2]),
        "spread": _relative(pointwise.spread(inner[:4, :24].contiguous(), slots), _spread(inner[:4, :24], slots)),
        "combine": _relative(
            pointwise.combine(rows, slots, weights.view(4, 3)), _combine(rows, slots, weights.view(4, 3))
        ),
        "sum": _relative(pointwise.combine(rows, slots, None), _combine(rows, slots, None)),
    }


def interpret() -> dict[str, Any]:
    """All errors; few programs per gradient, so that each takes several rows."""
    from grpo.policy.layers import pointwise

    pointwise.NORM_PROGRAMS = 4
    pointwise.COLUMNS = 32
    errors = {name: _layer_errors(name) for name in MODELS} | {"experts": _expert_errors()}
    return errors | {f"{name} stream": _stream_errors(name) for name in MODELS}


FLOATS = ("total_ptr", "partial_ptr", "weight_grad_ptr")
"""Pointers to float32 whatever the rows' type."""
STREAM = ("x_ptr", "skip_ptr", "x_grad_ptr")
"""Those of the norms between layers, which read and write the residual stream."""


def compile_kernels() -> dict[str, int]:
    """Size in bytes of every kernel's machine code for compute capability 9.0."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from grpo.policy.layers import pointwise_kernels as kernels

    def kind(name: str, is_constant: bool, is_norm: bool) -> str:
        if is_constant:
            return "constexpr"
        if is_norm and name in STREAM:
            return "*fp32"
        if not name.endswith("_ptr"):
            return "fp32" if name == "eps" else "i32"
        return "*i64" if name == "slots_ptr" else "*fp32" if name in FLOATS else "*bf16"

    rows, heads = {"WIDTH": 2048, "BLOCK": 2048}, {"NUM_HEADS": 32, "HEADS_BLOCK": 32, "HALF": 64}
    inner = {"WIDTH": 768, "BLOCK": 1024}
    plan: list[tuple[Any, dict[str, Any]]] = [(kernels.rms_norm_kernel, rows), (kernels.rms_norm_grad_kernel, rows)]
    plan += [(kernels.swiglu_kernel, inner)]
    plan += [(kernels.spread_kernel, {"WIDTH": 2048, "NUM_SLOTS": 8, "BLOCK": 1024})]
    for flag in (True, False):
        plan += [(kernels.accumulate_kernel, {"BLOCK": 2048, "ADD": flag})]
        plan += [(kernels.head_rotary_kernel, {**heads, "NORM": flag})]
        plan += [(kernels.head_rotary_grad_kernel, {**heads, "NORM": flag})]
        plan += [(kernels.swiglu_grad_kernel, {**inner, "WEIGHTED": flag})]
        plan += [(kernels.combine_kernel, {"WIDTH": 2048, "NUM_SLOTS": 8, "BLOCK": 1024, "WEIGHTED": flag})]
    sizes = {}
    for kernel, constants in plan:
        types = {name: kind(name, name in constants, constants is rows) for name in kernel.arg_names}
        source = ASTSource(kernel, types, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        sizes[f"{kernel.__name__} {constants}"] = len(compiled.asm["cubin"])
    return sizes


@pytest.fixture(scope="module")
def halves() -> Halves:
    return run_halves(__name__)


@pytest.mark.parametrize("name", [*MODELS, "experts"])
def test_interpreted_kernels_equal_the_plain_layer(halves: Halves, name: str) -> None:
    errors = halves.interpreted[name]
    assert len(errors) >= 6
    assert {key: error for key, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.parametrize("name", MODELS)
def test_the_residual_stream_is_never_rounded(halves: Halves, name: str) -> None:
    errors = halves.interpreted[f"{name} stream"]  # a stream in bfloat16 would make them 0.3 and more
    assert {key: error for key, error in errors.items() if not error < 0.02} == {}


def test_every_kernel_compiles_for_an_h100(halves: Halves) -> None:
    assert len(halves.compiled) == 4 + 5 * 2 and min(halves.compiled.values()) > 1000


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile_kernels": compile_kernels}[sys.argv[1]]()))
