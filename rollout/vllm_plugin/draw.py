"""A step's draw on a GPU: kernels that truncate, draw and record beside one reading of the logits (`draw_kernels.py`).

vLLM truncates, draws and reads log-probabilities in turn, each from logits that the one before has written. Here they
are read once and never written. What is drawn is what vLLM's own kernels draw for the same seed and position; the kept
sets are exact where vLLM's search stops after 18 halvings.

Shapes: B = rows, V = vocabulary, R = request slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rollout.vllm_plugin.launch import Launcher
from rollout.vllm_plugin.support import Layout, PackedStep, RouteBuffers, lay_out, name_parts

GUESS: dict[str, Any] = {"SAMPLE": 4096, "PIECE": 64}
"""A row's cut is guessed from so many of its ids, in runs of neighbours."""
SCAN: dict[str, Any] = {"CHUNK": 10_240, "BLOCK": 1024, "num_warps": 2}
"""Ids per program, and per load. 15 programs read a row of 151,936 ids."""
DRAW: dict[str, Any] = {"ROOM": 4096, "BLOCK": 4096, "num_warps": 8, "maxnreg": 128}
"""Candidates that a row has room for; ids per load of a walk. Registers for two rows at a time on a multiprocessor."""
_KEYED = "logits_ptr", "logits_stride"
"""Of what changes from step to step, what the kernels are specialised by."""


class Rows(NamedTuple):
    """What a step draws from."""

    logits: Tensor  # float [B, V]; any further columns are passed over
    slots: Tensor  # int32 [B], each row's request slot
    positions: Tensor  # int64 [B], of the last token before the draw
    num_sampled: Tensor  # int32 [B]: 0 = nothing is sampled, the row's token means nothing


class Settings(NamedTuple):
    """How each request slot samples."""

    temperature: Tensor  # float32 [R]
    top_k: Tensor  # int32 [R]; V = none
    top_p: Tensor  # float32 [R]; 1 = none
    seeds: Tensor  # int64 [R]


class _Scratch(NamedTuple):
    """What the kernels of a step hand on; steps on one stream may share it. S chunks of a row, W = their ids / 32."""

    cuts: Tensor  # float32 [B]
    sums: Tensor  # float32 [B, S, 2]
    marks: Tensor  # int32 [B, W]
    bests: Tensor  # float32 [B, S]
    tokens: Tensor  # int32 [B, S]
    candidates: Tensor  # int32 [B, most]
    num_placed: Tensor  # int32 [1]


class _Plan(NamedTuple):
    """What steps of one shape have in common."""

    layout: Layout
    num_words: int
    """Of a packed step: int32."""
    integers: tuple[int, ...]
    """What `draw_rows` takes."""
    num_programs: int
    """Of `draw_rows`."""


class StepDrawer:
    """Draws and packs steps of at most `max_rows` rows over a vocabulary of `vocab_size` ids.

    With `buffers` a step's routes are packed too. It has room for `room_per_row` kept ids per row, on average over its
    rows.
    """

    settings: Settings
    """Of `max_rows` request slots, for the caller to fill."""

    def __init__(
        self,
        *,
        max_rows: int,
        vocab_size: int,
        device: torch.device,
        buffers: RouteBuffers | None,
        room_per_row: int = 512,
    ) -> None:
        self._vocab_size, self._device, self._buffers, self._room_per_row = vocab_size, device, buffers, room_per_row
        self._num_chunks = -(-vocab_size // SCAN["CHUNK"])
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.settings = Settings(
            temperature=torch.ones(max_rows, **floats),
            top_k=torch.full((max_rows,), vocab_size, **ints),
            top_p=torch.ones(max_rows, **floats),
            seeds=torch.zeros(max_rows, dtype=torch.int64, device=device),
        )
        chunks = max_rows, self._num_chunks
        self._scratch = _Scratch(
            cuts=torch.empty(max_rows, **floats),
            sums=torch.empty(*chunks, 2, **floats),
            marks=torch.empty(max_rows, self._num_chunks * SCAN["CHUNK"] // 32, **ints),
            bests=torch.empty(chunks, **floats),
            tokens=torch.empty(chunks, **ints),
            candidates=torch.empty(max_rows, DRAW["ROOM"], **ints),
            num_placed=torch.empty(1, **ints),
        )
        self._guess, self._scan, *self._draws = self._make_launchers()
        self._shape, self._plan = (0, 0, False), self._make_plan(0, 0, records=False)

    def __call__(self, rows: Rows, num_tokens: int, *, truncates: bool, records: bool) -> tuple[Tensor, PackedStep]:
        """int64 [B] and the step: log-probabilities of these tokens, supports, and the routes of `num_tokens` tokens.

        `truncates` says whether any row does, `records` whether the supports of those that do are wanted. Raises
        ValueError for a step whose record is over 8 GiB.
        """
        num_rows, records = len(rows.logits), records and truncates
        shape = num_rows, num_tokens, records
        if shape != self._shape:
            self._shape, self._plan = shape, self._make_plan(num_rows, num_tokens, records=records)
        plan, device = self._plan, self._device
        packed = torch.empty(plan.num_words, dtype=torch.int32, device=device)
        sampled = torch.empty(num_rows, dtype=torch.int64, device=device)
        bits = None
        if records:
            bits = torch.empty(num_rows, -(-self._vocab_size // 8), dtype=torch.uint8, device=device)
        self._launch(rows, sampled, packed, bits, truncates=truncates)
        return sampled, name_parts(packed, plan.layout, num_rows, num_tokens, self._buffers, bits)

    def _launch(self, rows: Rows, sampled: Tensor, packed: Tensor, bits: Tensor | None, *, truncates: bool) -> None:
        logits, slots, positions, num_sampled = rows
        num_rows, stride = logits.shape[0], logits.stride(0)
        key = logits.dtype, logits.data_ptr() % 16, stride, slots.dtype, positions.dtype, num_sampled.dtype
        if truncates:
            self._guess((num_rows, 1, 1), key, (logits, slots), (stride,))
        self._scan((num_rows, self._num_chunks, 1), key, (logits, slots, positions), (stride,))
        written = (sampled, packed, packed) if bits is None else (sampled, packed, bits)
        self._draws[bits is not None](
            (self._plan.num_programs, 1, 1), key, (*rows, *written), (stride, *self._plan.integers)
        )

    def _make_plan(self, num_rows: int, num_tokens: int, *, records: bool) -> _Plan:
        buffers, layout = self._buffers, lay_out(self._buffers, num_rows, num_tokens)
        room = num_rows * self._room_per_row if records else 0
        if layout.ids + room >= 2**31:
            raise ValueError(
                f"a step of {num_rows} rows and {num_tokens} tokens leaves more than 8 GiB to record; lower "
                "rollout.max_batched_tokens"
            )
        num_ids = 0 if buffers is None else num_tokens * buffers.ids[0].numel()
        return _Plan(
            layout=layout,
            num_words=layout.ids + room,
            integers=(*layout, room, num_rows, num_tokens),
            num_programs=num_rows + -(-num_ids // DRAW["BLOCK"]),
        )

    def _make_launchers(self) -> tuple[Launcher, ...]:
        """Of `guess_cuts`, `scan_chunks`, and `draw_rows` without and with supports."""
        from rollout.vllm_plugin import draw_kernels as kernels  # needs Triton

        work, vocab_size, routes = self._scratch, self._vocab_size, self._buffers
        wanted = vocab_size if vocab_size <= DRAW["ROOM"] else DRAW["ROOM"] * 3 // 8
        rank = GUESS["SAMPLE"] * wanted // vocab_size
        found = work.sums, work.marks, work.bests, work.tokens
        cache_slots, ids = (work.tokens, work.tokens) if routes is None else (routes.slots, routes.ids)
        guess = self.settings.temperature, work.cuts, vocab_size, rank
        scan = *self.settings, work.cuts, *found, work.num_placed, vocab_size
        draw = *self.settings, *found, work.candidates, work.num_placed, cache_slots, ids, vocab_size, ids[0].numel()
        constants = {**DRAW, "CHUNKS": self._num_chunks, "WORDS": work.marks.shape[1]}
        constants["ROUTE_BYTES"] = 0 if routes is None else routes.dtype.itemsize
        return (
            Launcher(kernels.guess_cuts, guess, GUESS, _KEYED),
            Launcher(kernels.scan_chunks, scan, SCAN, _KEYED),
            *(Launcher(kernels.draw_rows, draw, {**constants, "RECORD": records}, _KEYED) for records in (False, True)),
        )
