"""A step's draw on a GPU: kernels that truncate, draw and record beside one reading of the logits (`draw_kernels.py`).

vLLM truncates, draws and reads log-probabilities in turn, each from logits that the one before has written. Here they
are read once and never written. What is drawn is what vLLM's own kernels draw for the same seed and position; the kept
sets are exact where vLLM's search stops after 18 halvings.

Shapes: B = rows, V = vocabulary, R = request slots.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rollout.vllm_plugin.support import Layout, PackedStep, RouteBuffers, lay_out, name_parts

GUESS: dict[str, Any] = {"SAMPLE": 4096, "PIECE": 64}
"""A row's cut is guessed from so many of its ids, in runs of neighbours."""
SCAN: dict[str, Any] = {"CHUNK": 10_240, "BLOCK": 1024, "num_warps": 2}
"""Ids per program, and per load. 15 programs read a row of 151,936 ids."""
DRAW: dict[str, Any] = {"ROOM": 4096, "BLOCK": 4096, "num_warps": 8, "maxnreg": 128}
"""Candidates that a row has room for; ids per load of a walk. Registers for two rows at a time on a multiprocessor."""
PACK: dict[str, Any] = {"WIDTH": DRAW["ROOM"], "BLOCK": 1024}
_STEP_ROOM = 512
"""Kept ids per row that a packed step has room for, on average over its rows."""


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
    thetas: Tensor  # float32 [B]
    lasts: Tensor  # int32 [B]
    sizes: Tensor  # int32 [B]
    kept: Tensor  # int32 [B, most]


class StepDrawer:
    """Draws and packs steps of at most `max_rows` rows over a vocabulary of `vocab_size` ids.

    With `buffers` a step's routes are packed too.
    """

    settings: Settings
    """Of `max_rows` request slots, for the caller to fill."""

    def __init__(self, *, max_rows: int, vocab_size: int, device: torch.device, buffers: RouteBuffers | None) -> None:
        self._vocab_size = vocab_size
        self._num_chunks = -(-vocab_size // SCAN["CHUNK"])
        self._num_words = self._num_chunks * SCAN["CHUNK"] // 32
        self._buffers = buffers
        wanted = vocab_size if vocab_size <= DRAW["ROOM"] else DRAW["ROOM"] * 3 // 8
        self._rank = GUESS["SAMPLE"] * wanted // vocab_size
        chunks = (max_rows, self._num_chunks)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.settings = Settings(
            temperature=torch.ones(max_rows, **floats),
            top_k=torch.full((max_rows,), vocab_size, **ints),
            top_p=torch.ones(max_rows, **floats),
            seeds=torch.zeros(max_rows, dtype=torch.int64, device=device),
        )
        self._scratch = _Scratch(
            cuts=torch.empty(max_rows, **floats),
            sums=torch.empty(*chunks, 2, **floats),
            marks=torch.empty(max_rows, self._num_words, **ints),
            bests=torch.empty(chunks, **floats),
            tokens=torch.empty(chunks, **ints),
            thetas=torch.empty(max_rows, **floats),
            lasts=torch.empty(max_rows, **ints),
            sizes=torch.empty(max_rows, **ints),
            kept=torch.empty(max_rows, DRAW["ROOM"], **ints),
        )

    def __call__(self, rows: Rows, num_tokens: int, *, truncates: bool, records: bool) -> tuple[Tensor, PackedStep]:
        """int64 [B] and the step: log-probabilities of these tokens, supports, and the routes of `num_tokens` tokens.

        `truncates` says whether any row does, `records` whether the supports of those that do are wanted.
        """
        num_rows, device = len(rows.logits), rows.logits.device
        records = records and truncates
        layout = lay_out(self._buffers, num_rows, num_tokens)
        room = num_rows * _STEP_ROOM if records else 0
        packed = torch.empty(layout.ids + room, dtype=torch.int32, device=device)
        sampled = torch.empty(num_rows, dtype=torch.int64, device=device)
        self._draw(rows, sampled, packed, layout.logprobs, truncates=truncates)
        bits = None
        if records:
            bits = torch.empty(num_rows, -(-self._vocab_size // 8), dtype=torch.uint8, device=device)
        if records or self._buffers is not None:
            self._pack(rows, packed, bits, layout, num_tokens)
        return sampled, name_parts(packed, layout, num_rows, num_tokens, self._buffers, bits)

    def _draw(self, rows: Rows, sampled: Tensor, packed: Tensor, logprobs_at: int, *, truncates: bool) -> None:
        from rollout.vllm_plugin import draw_kernels

        kernels: Any = draw_kernels  # a launch is not typed
        num_rows, work = len(rows.logits), self._scratch
        source = rows.logits, rows.logits.stride(0), rows.slots
        found = work.sums, work.marks, work.bests, work.tokens
        if truncates:
            kernels.guess_cuts[(num_rows,)](
                *(*source, self.settings.temperature, work.cuts, self._vocab_size, self._rank), **GUESS
            )
        kernels.scan_chunks[(num_rows, self._num_chunks)](
            *(*source, *self.settings, rows.positions, work.cuts, *found, self._vocab_size),
            **SCAN,
        )
        kernels.draw_rows[(num_rows,)](
            *(*source, *self.settings, rows.positions, *found, sampled, packed, logprobs_at),
            *(work.thetas, work.lasts, work.sizes, work.kept, self._vocab_size),
            CHUNKS=self._num_chunks,
            WORDS=self._num_words,
            **DRAW,
        )

    def _pack(self, rows: Rows, packed: Tensor, bits: Tensor | None, layout: Layout, num_tokens: int) -> None:
        from rollout.vllm_plugin import support_kernels

        kernels: Any = support_kernels
        num_rows, work, routes = len(rows.logits), self._scratch, self._buffers
        row_ids = 0 if routes is None else math.prod(routes.ids.shape[1:])
        kernels.pack_step[(num_rows + -(-num_tokens * row_ids // PACK["BLOCK"]),)](
            *(rows.logits, rows.logits.stride(0), rows.slots, self.settings.temperature, rows.num_sampled),
            *(work.thetas, work.lasts, work.sizes, work.kept),
            *((packed, 0) if bits is None else (bits, bits.stride(0))),
            *((packed, packed) if routes is None else (routes.slots, routes.ids)),
            *(packed, layout.slots, layout.routes, layout.ids, num_rows, len(packed) - layout.ids, self._vocab_size),
            *(num_tokens, row_ids),
            RECORD=bits is not None,
            ROUTE_BYTES=0 if routes is None else routes.dtype.itemsize,
            **PACK,
        )
