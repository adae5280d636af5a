"""The kernels that draw on a GPU, through Triton's interpreter: tokens against vLLM's own kernel and its CPU stand-in,
kept sets and log-probabilities against the definition in float64; routes; and compiled for an H100.

Triton reads TRITON_INTERPRET when it is imported and then compiles nothing, so each half runs in a process of its own:
this file run as a module with the half's name.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from rollout.vllm_plugin import draw
from rollout.vllm_plugin.draw import Rows, Settings, StepDrawer
from rollout.vllm_plugin.kernels_sample import gumbel_noise
from rollout.vllm_plugin.support import PackedStep, StepRecord
from tests.rollout.packed_steps import StepSets, read_logprobs, read_routes, read_sets
from tests.rollout.test_support import make_buffers
from tests.triton_process import run_half

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


class Row(NamedTuple):
    """One row of logits, drawn from a normal distribution, and how it is sampled."""

    spread: float
    top_p: float = 1.0
    top_k: float = 0
    """0 = none; below 1, a share of the vocabulary."""
    temperature: float = 1.0
    step: float = 0.0
    """Logits are multiples of this, so that many are equal."""
    num_finite: int | None = None
    is_sampled: bool = True

    def count_top(self, vocab_size: int) -> int:
        """top-k as vLLM has it."""
        return int(self.top_k if self.top_k >= 1 else self.top_k * vocab_size) or vocab_size


ROWS = {
    "top-p": Row(5, 0.9),
    "top-p, temperature": Row(3, 0.9, temperature=0.6),
    "top-k": Row(2, top_k=20),
    "both": Row(4, 0.8, 60),
    "one id": Row(4, 1e-6),
    "no truncation": Row(3),
    "no truncation, temperature": Row(3, temperature=1.7),
    "greedy": Row(4, 0.9, temperature=0.0),
    "greedy without truncation": Row(4, temperature=0.0),
    "ties at top-p": Row(4, 0.9, step=1.0),
    "ties at top-k": Row(4, top_k=50, step=1.0),
    "ties at both": Row(4, 0.7, 50, step=1.0),
    "samples nothing": Row(5, 0.9, is_sampled=False),
    "few finite": Row(4, 0.95, num_finite=200),
    "below the cut, fewer finite": Row(4, 0.9, 500, num_finite=200),
    "below the cut, top-p": Row(0.5, 0.5),
    "below the cut, top-k": Row(2, 0.9, 0.3, temperature=1.3),
    "below the cut, ties": Row(1.5, 0.8, 0.4, step=0.5),
    "greedy, below the cut": Row(1, 0.99, temperature=0.0),
    "below the cut, all of it": Row(1, 1 - 1e-7),
    "samples nothing, below the cut": Row(0.5, 0.5, is_sampled=False),
    "no truncation, samples nothing": Row(3, is_sampled=False),
    "the last": Row(5, 0.9),
}
NUM_PLAIN = 7  # rows of each kind but the walked ones
FEW = [*range(NUM_PLAIN), list(ROWS).index("below the cut, top-p"), len(ROWS) - 1]
"""Rows with one walked among them."""


def make_rows(vocab_size: int) -> tuple[Rows, Settings]:
    """Rows in another order than their request slots; the logits of the first third of the vocabulary are higher."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(ROWS), vocab_size, generator=generator)
    logits[:, : vocab_size // 3] += 0.3
    for line, row in zip(logits, ROWS.values(), strict=True):
        line *= row.spread
        if row.step:
            line.copy_((line / row.step).round() * row.step)
        if row.num_finite is not None:
            line[torch.randperm(vocab_size, generator=generator)[row.num_finite :]] = -torch.inf
    slots = torch.arange(len(ROWS), dtype=torch.int32).flip(0)
    positions = torch.randint(0, 2**34, (len(ROWS),), generator=generator)
    num_sampled = torch.tensor([row.is_sampled for row in ROWS.values()]).int()
    last_first = list(ROWS.values())[::-1]
    settings = Settings(
        torch.tensor([row.temperature for row in last_first]),
        torch.tensor([row.count_top(vocab_size) for row in last_first], dtype=torch.int32),
        torch.tensor([row.top_p for row in last_first]),
        torch.randint(-(2**62), 2**62, (len(ROWS),), generator=generator),
    )
    return Rows(logits, slots, positions, num_sampled), settings


def make_drawer(settings: Settings, vocab_size: int, device: torch.device, **options: Any) -> StepDrawer:
    """With these settings."""
    options = {"buffers": None, **options}
    drawer = StepDrawer(max_rows=len(ROWS), vocab_size=vocab_size, device=device, **options)
    for own, wanted in zip(drawer.settings, settings, strict=True):
        own.copy_(wanted)
    return drawer


class Record(NamedTuple):
    """A packed step, as its layout says."""

    logprobs: np.ndarray  # float32 [B]
    sizes: np.ndarray  # int32 [B]
    supports: list[np.ndarray]  # B times int32
    slots: np.ndarray  # int64 [T]
    routes: np.ndarray  # uint8 | uint16 [T, L, K]


def read(step: PackedStep) -> Record:
    """Every support from where it lies. The ids of no two rows share a place."""
    on_host = StepRecord(step.packed.cpu().numpy(), step.layout, step.route_shape or (0,), step.route_dtype)
    logprobs, (slots, routes) = read_logprobs(on_host, step.num_rows), read_routes(on_host)
    sets = read_sets(on_host, step.num_rows)
    if step.bits is None:
        return Record(logprobs, on_host.packed[: step.num_rows], [], slots, routes)
    assert sets is not None
    ids, sizes, starts = sets
    is_taken, supports = np.zeros(len(ids), int), []
    for size, start, bits in zip(sizes, starts, step.bits.cpu().numpy(), strict=True):
        found = np.flatnonzero(np.unpackbits(bits, bitorder="little")) if size < 0 else ids[start : start + size]
        assert len(found) == abs(size)
        is_taken[start : start + max(size, 0)] += 1
        supports.append(found)
    assert is_taken.max() == 1
    return Record(logprobs, sizes, supports, slots, routes)


def arrive(step: PackedStep) -> StepSets:
    """The supports as the host has them."""
    on_host = step.to_cpu_nonblocking()
    if step.packed.is_cuda:
        torch.cuda.synchronize()
    sets = read_sets(on_host.tolists(), step.num_rows)
    assert sets is not None
    return sets


class Drawn(NamedTuple):
    """What came of the rows, on the host."""

    rows: Rows
    settings: Settings  # by row
    tokens: np.ndarray
    record: Record
    plain: Record
    """The first rows, recorded without supports."""


def draw_all(device: torch.device, vocab_size: int) -> Drawn:
    """Every row through the kernels of `device`; some once more without room for all ids, and without recording any."""
    rows, settings = make_rows(vocab_size)
    there = Rows(*(tensor.to(device) for tensor in rows))
    drawer = make_drawer(settings, vocab_size, device)
    tokens, step = drawer(there, 0, truncates=True, records=True)
    record = read(step)
    check_short(record, tokens, there, settings)
    some = Rows(*(tensor[:NUM_PLAIN] for tensor in there))
    again, plain = drawer(some, 0, truncates=True, records=False)
    assert torch.equal(tokens[:NUM_PLAIN], again) and torch.equal(there.logits.cpu(), rows.logits)
    by_row = Settings(*(setting[rows.slots] for setting in settings))
    return Drawn(rows, by_row, tokens.cpu().numpy(), record, read(plain))


def check_short(record: Record, tokens: Tensor, there: Rows, settings: Settings) -> None:
    """Draws a few rows with room for half of their ids. Asserts that nothing but the place of some is another."""
    sizes, vocab_size, device = record.sizes[FEW], there.logits.shape[1], there.logits.device
    fits = sizes > 0
    room = int(max(sizes.max(), sizes[fits].sum() // 2))
    drawer = make_drawer(settings, vocab_size, device, room_per_row=-(-room // len(FEW)))
    for _ in range(2):  # the second step finds as much room as the first
        again, step = drawer(Rows(*(tensor[FEW] for tensor in there)), 0, truncates=True, records=True)
        short = read(step)
        assert torch.equal(tokens[FEW], again) and np.array_equal(record.logprobs[FEW], short.logprobs)
        assert all(map(np.array_equal, [record.supports[i] for i in FEW], short.supports))
        sets = arrive(step)
        on_host = [sets.ids[start : start + size] for start, size in zip(sets.starts, sets.sizes, strict=True)]
        assert all(map(np.array_equal, on_host, short.supports))
        assert (short.sizes[fits] < 0).any() and (short.sizes[fits] > 0).any()
        assert np.array_equal(short.sizes[~fits], sizes[~fits]) and sizes.min() < 0


def compare(device: torch.device, vocab_size: int) -> dict[str, Any]:
    """By row: whether the kept set is what it should be, whether vLLM's kernel and its stand-in draw the same token,
    whether a bit per id was recorded, and the error of the log-probability."""
    rows, settings, tokens, record, plain = draw_all(device, vocab_size)
    scaled = rows.logits / torch.where(settings.temperature == 0, 1, settings.temperature)[:, None]
    masked = torch.full_like(scaled, -torch.inf)
    sets_are_right = []
    for line, left, ids, row in zip(scaled.numpy(), masked.numpy(), record.supports, ROWS.values(), strict=True):
        order, least, most = find_support(line, row)
        truncates = row.top_p < 1 or row.top_k > 0
        is_right = (len(ids) > 0) == (row.is_sampled and truncates)
        ids = ids if len(ids) else np.sort(order[:most])
        left[ids] = line[ids]
        is_right &= least <= len(ids) <= most and np.array_equal(ids, np.sort(order[: len(ids)]))
        sets_are_right.append(is_right)
    exact = masked.double().log_softmax(-1).numpy()[np.arange(len(ROWS)), tokens]
    errors = np.abs(record.logprobs - exact)
    errors[:NUM_PLAIN] = np.maximum(errors[:NUM_PLAIN], np.abs(plain.logprobs - exact[:NUM_PLAIN]))
    vllms = draw_as_vllm(masked, rows, settings, device)
    on_host = [draw_on_host(masked[i].numpy(), settings, int(rows.positions[i]), i) for i in range(len(ROWS))]
    same = (tokens == vllms).tolist(), (tokens == on_host).tolist()
    columns = sets_are_right, *same, (record.sizes < 0).tolist(), errors.tolist()
    return {name: list(column) for name, *column in zip(ROWS, *columns, strict=True)}


def check(results: dict[str, Any]) -> None:
    """That `compare` has found every row as it should be."""
    assert set(results) == set(ROWS)
    for name, (is_right, as_vllm, as_stand_in, has_bits, error) in results.items():
        assert is_right and as_vllm and as_stand_in and error < 1e-5, name
        assert has_bits == (name.startswith("below the cut") or name == "greedy, below the cut"), name


def find_support(logits: np.ndarray, row: Row) -> tuple[np.ndarray, int, int]:
    """Ids from the likeliest on, and the least and most of them that make up the kept set; they differ by rounding."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    size = min(row.count_top(len(logits)), int(np.isfinite(logits).sum()))
    if row.top_p == 1:
        return order, size, size
    high = logits[order[:size]].astype(np.float64)
    before = np.cumsum(np.exp(high - high[0]))
    before = np.concatenate([[0], before[:-1] / before[-1]])
    top_p = float(np.float32(row.top_p))
    return order, int((before < top_p - 1e-6).sum()) or 1, int((before < top_p + 1e-6).sum())


def draw_as_vllm(masked: Tensor, rows: Rows, settings: Settings, device: torch.device) -> np.ndarray:
    """By vLLM's own kernel, from the logits that are left."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    sample: Any = gumbel_sample
    sources = masked, torch.arange(len(ROWS), dtype=torch.int32), settings.temperature, settings.seeds, rows.positions
    return sample(*(source.to(device) for source in sources), False, is_drafting=False).cpu().numpy()


def draw_on_host(masked: np.ndarray, settings: Settings, position: int, row: int) -> int:
    """With the noise of the stand-in for that kernel."""
    ids = np.flatnonzero(np.isfinite(masked))
    scores = masked[ids]
    if settings.temperature[row] != 0:
        scores = scores + gumbel_noise(np.full(len(ids), settings.seeds[row]), np.full(len(ids), position), ids)
    return int(ids[scores.argmax()])


def draws_routes(device: torch.device, vocab_size: int, num_experts: int, num_tokens: int, *, records: bool) -> bool:
    """Whether routes and slots arrive as they are, and the rest as it does without them."""
    buffers = make_buffers(num_experts)
    there = buffers._replace(slots=buffers.slots.to(device), ids=buffers.ids.to(device))
    rows, settings = make_rows(vocab_size)
    few = Rows(*(tensor[:3].to(device) for tensor in rows))
    drawn = []
    for options in ({"buffers": there}, {}):
        drawer = make_drawer(settings, vocab_size, device, **options)
        tokens, step = drawer(few, num_tokens, truncates=True, records=records)
        drawn.append((tokens, read(step)))
    (tokens, record), (tokens_alone, alone) = drawn
    return bool(
        record.routes.dtype == buffers.dtype
        and np.array_equal(record.slots, buffers.slots[:num_tokens])
        and np.array_equal(record.routes, buffers.ids[:num_tokens])
        and torch.equal(tokens, tokens_alone)
        and np.array_equal(record.logprobs, alone.logprobs)
        and len(record.supports) == len(alone.supports) == (3 if records else 0)
        and all(map(np.array_equal, record.supports, alone.supports))
    )


ROUTES = [(experts, tokens, records) for experts in (200, 300) for tokens in (3, 40) for records in (True, False)]
"""The last arguments of `draws_routes`; three rows draw."""


def interpret() -> dict[str, Any]:
    """What `compare` finds, and whether routes arrive, with kernels that take a twentieth of a usual vocabulary."""
    show_triton_to_vllm()
    for sizes, smaller in (
        (draw.GUESS, {"SAMPLE": 512, "PIECE": 16}),
        (draw.SCAN, {"CHUNK": 1024, "BLOCK": 256}),
        (draw.DRAW, {"ROOM": 1024, "BLOCK": 512}),
    ):
        sizes.update(smaller)
    cpu, vocab_size = torch.device("cpu"), 5_003  # five chunks of a row, the last one not full
    routes = [draws_routes(cpu, vocab_size, experts, tokens, records=records) for experts, tokens, records in ROUTES]
    return {"rows": compare(cpu, vocab_size), "routes": routes}


def compile_kernels() -> dict[str, int]:
    """Size in bytes of the kernels' machine code for compute capability 9.0."""
    show_triton_to_vllm()
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from rollout.vllm_plugin import draw_kernels

    floats = ("logits", "temperature", "top_p", "cuts", "sums", "bests")
    pointers = {f"{name}_ptr": "*fp32" for name in floats} | {"bits_ptr": "*u8"}
    pointers |= {f"{name}_ptr": "*i64" for name in ("seeds", "positions", "sampled", "cache_slots")}
    rows = {**draw.DRAW, "CHUNKS": 15, "WORDS": 15 * draw.SCAN["CHUNK"] // 32}
    variants: list[tuple[Any, dict[str, Any]]] = [
        (draw_kernels.guess_cuts, draw.GUESS),
        (draw_kernels.scan_chunks, draw.SCAN),
        *((draw_kernels.draw_rows, {**rows, "RECORD": True, "ROUTE_BYTES": width}) for width in (0, 1, 2)),
        *((draw_kernels.draw_rows, {**rows, "RECORD": False, "ROUTE_BYTES": width}) for width in (0, 1)),
    ]
    sizes = {}
    for kernel, options in variants:
        constants = {name: value for name, value in options.items() if name in kernel.arg_names}
        names = [name for name in kernel.arg_names if name not in constants]
        types = {name: pointers.get(name, "*i32" if name.endswith("_ptr") else "i32") for name in names}
        source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constexprs=constants)
        launch = {name: value for name, value in options.items() if name not in constants}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
        sizes[f"{kernel.__name__} {constants}"] = len(compiled.asm["cubin"])
    return sizes


def show_triton_to_vllm() -> None:
    """vLLM's CPU build hides Triton from its own kernels; here they are wanted."""
    import triton  # pyright: ignore[reportMissingImports]

    visible = types.ModuleType("vllm.triton_utils")
    vars(visible).update(triton=triton, tl=triton.language)
    sys.modules["vllm.triton_utils"] = visible


@needs_triton
@pytest.mark.slow
def test_the_kernels_through_the_interpreter() -> None:
    results = run_half(__name__, "interpret", interpret=True)
    assert all(results["routes"])
    check(results["rows"])


@needs_triton
def test_the_kernels_compile_for_an_h100() -> None:
    sizes = run_half(__name__, "compile_kernels", interpret=False)
    assert len(sizes) == 7 and min(sizes.values()) > 1000


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile_kernels": compile_kernels}[sys.argv[1]]()))
