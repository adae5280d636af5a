"""What a step leaves on the device, in one array: each row's log-probability, the support of the rows that truncate,
and the routes of the step's tokens.

On a GPU two kernels read the truncated logits once and pack everything (`support_kernels.py`); on a CPU torch and numpy
do. Either way the supports come as one run of ids. A row that does not fit in its room leaves a bit per id of the
vocabulary instead: no bound changes a record.

Shapes: B = rows, V = vocabulary, N = ids of all supports, T = tokens, L = decoder layers, K = experts per token.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rollout.vllm_plugin.step_log import StepSets

_CHUNK, _BLOCK = 10_240, 2048
"""Ids per program and per load. 15 programs walk a row of 151,936."""
_CHUNK_ROOM = 512
_ROW_ROOM = 512
"""Ids per row that the device has room for, on average over the rows of a step."""


class RouteBuffers(NamedTuple):
    """Where vLLM leaves a step's routes, and the cache slots of its tokens; the next step overwrites both."""

    slots: Tensor  # int64 [most tokens]
    ids: Tensor  # int32 [most tokens, L, K]
    dtype: np.dtype
    """Of the ids on the host: uint8 or uint16."""


class StepRoutes(NamedTuple):
    """The routes of one step's tokens, and the cache slots that the tokens' keys and values went to."""

    slots: np.ndarray  # int64 [T]
    routes: np.ndarray  # uint8 | uint16 [T, L, K]


class StepRecord(NamedTuple):
    """One step on the host. The arrays may be views of memory that is used again once nothing here refers to it."""

    logprobs: np.ndarray  # float32 [B]
    sets: StepSets | None
    """Rows that do not truncate, or have sampled nothing, are empty; None if no row of the step is recorded."""
    routes: StepRoutes | None


class _Layout(NamedTuple):
    """Where the parts of a packed step begin, counted in int32; each from 16 bytes on."""

    logprobs: int
    """Float32 [B]. The sizes of the supports come first: int32 [B], negative where the ids are elsewhere."""
    slots: int  # int64 [T]
    routes: int  # [T, L, K]
    ids: int  # int32 [N]


class PackedStep(NamedTuple):
    """One step on its way to the host. It stands in for vLLM's `SamplingMaskTensors` and has its two methods."""

    packed: Tensor  # int32
    layout: _Layout
    num_rows: int
    route_shape: tuple[int, ...]
    """T, L, K; empty without routes."""
    route_dtype: np.dtype
    bits: Tensor | None = None
    """uint8 [B, ceil(V / 8)], stays on the device: the supports whose size is negative, lowest bit first."""

    def to_cpu_nonblocking(self) -> PackedStep:
        """Begins the copy, on the stream that vLLM has made current. `self` has to be kept until it is done."""
        if not self.packed.is_cuda:
            return self
        return self._replace(packed=self.packed.to("cpu", non_blocking=True))

    def tolists(self, num_sampled: np.ndarray | None = None) -> StepRecord:
        """The step's arrays, once the copy is done."""
        packed, at = self.packed.numpy(), self.layout
        sizes, ids = packed[: self.num_rows], packed[at.ids :]
        sets = None
        if len(ids):
            sets = StepSets(ids[: int(sizes.sum())], sizes) if sizes.min() >= 0 else self._complete(ids, sizes)
        logprobs = packed[at.logprobs : at.logprobs + self.num_rows].view(np.float32)
        return StepRecord(logprobs, sets, self._view_routes(packed) if self.route_shape else None)

    def _view_routes(self, packed: np.ndarray) -> StepRoutes:
        slots = packed[self.layout.slots : self.layout.routes].view(np.int64)[: self.route_shape[0]]
        ids = packed[self.layout.routes : self.layout.ids].view(self.route_dtype)[: math.prod(self.route_shape)]
        return StepRoutes(slots, ids.reshape(self.route_shape))

    def _complete(self, ids: np.ndarray, signed: np.ndarray) -> StepSets:
        """Takes the rows that had no room from the vocabulary's bits."""
        assert self.bits is not None
        sizes = np.abs(signed)
        ends = np.cumsum(sizes, dtype=np.int64)
        missing = np.empty(max(ends[-1] - len(ids), 0), np.int32)
        rows = np.split(np.concatenate([ids, missing])[: ends[-1]], ends[:-1])
        incomplete = np.flatnonzero(signed < 0)
        # Beside the default stream, where this would wait for the step in progress.
        with torch.cuda.stream(torch.cuda.Stream() if self.bits.is_cuda else None):
            bits = self.bits[torch.from_numpy(incomplete).to(self.bits.device)].cpu().numpy()
        for row, flags in zip(incomplete.tolist(), bits, strict=True):
            rows[row] = np.flatnonzero(np.unpackbits(flags, bitorder="little")).astype(np.int32)
        return StepSets(np.concatenate(rows), sizes)


class StepPacker:
    """Packs steps of at most `max_rows` rows over a vocabulary of `vocab_size` ids.

    On a GPU it holds the memory that the two kernels pass results through; steps on one stream may share it. With
    `buffers` a step's routes are packed too.
    """

    def __init__(self, *, max_rows: int, vocab_size: int, device: torch.device, buffers: RouteBuffers | None) -> None:
        self._vocab_size = vocab_size
        self._num_chunks = -(-vocab_size // _CHUNK)
        self._buffers = buffers
        self._row_shape = () if buffers is None else tuple(buffers.ids.shape[1:])
        self._row_ids = 0 if buffers is None else math.prod(self._row_shape)
        self._dtype = np.dtype(np.uint8) if buffers is None else buffers.dtype
        self._scratch: tuple[Tensor, ...] = ()
        if device.type != "cpu":
            self._scratch = self._make_scratch(max_rows, device)

    def __call__(
        self,
        logits: Tensor,  # float32 [B, V]; -inf = removed by truncation
        sampled: Tensor,  # int64 [B]
        num_sampled: Tensor,  # int32 [B]: 0 = nothing was sampled, the row's token means nothing
        truncates: Tensor | None,  # int32 [B]: 0 = the row's support is the vocabulary; None = record no supports
        num_tokens: int,
    ) -> PackedStep:
        """log softmax(logits)[sampled] of every row; the ids of finite logit where a row truncates and has sampled."""
        layout = self._lay_out(len(logits), num_tokens)
        shape = (num_tokens, *self._row_shape) if self._row_shape else ()
        pack = self._pack_on_gpu if self._scratch else self._pack_on_cpu
        packed, bits = pack(logits, sampled, num_sampled, truncates, num_tokens, layout)
        return PackedStep(packed, layout, len(logits), shape, self._dtype, bits)

    def _lay_out(self, num_rows: int, num_tokens: int) -> _Layout:
        slots = 2 * _rounded(num_rows)
        if self._buffers is None:
            return _Layout(slots // 2, slots, slots, slots)
        routes = slots + _rounded(2 * num_tokens)
        num_bytes = num_tokens * self._row_ids * self._dtype.itemsize
        return _Layout(slots // 2, slots, routes, routes + _rounded(-(-num_bytes // 4)))

    def _make_scratch(self, max_rows: int, device: torch.device) -> tuple[Tensor, ...]:
        chunks = max_rows * self._num_chunks
        sums = torch.empty(chunks, 2, dtype=torch.float32, device=device)
        counts = torch.empty(chunks, dtype=torch.int32, device=device)
        return sums, counts, torch.empty(chunks, _CHUNK_ROOM, dtype=torch.int32, device=device)

    def _pack_on_gpu(
        self,
        logits: Tensor,
        sampled: Tensor,
        num_sampled: Tensor,
        truncates: Tensor | None,
        num_tokens: int,
        layout: _Layout,
    ) -> tuple[Tensor, Tensor | None]:
        from rollout.vllm_plugin import support_kernels

        kernels: Any = support_kernels  # a launch is not typed
        num_rows, record = len(logits), truncates is not None
        room = num_rows * _ROW_ROOM if record else 0
        packed = torch.empty(layout.ids + room, dtype=torch.int32, device=logits.device)
        bits = None
        if record:
            bits = torch.empty(num_rows, -(-self._vocab_size // 8), dtype=torch.uint8, device=logits.device)
        sums, counts, chunk_ids = self._scratch
        shape: dict[str, Any] = {"BLOCK": _BLOCK, "WIDTH": _CHUNK_ROOM, "RECORD": record}
        kernels.scan_chunks[(num_rows, self._num_chunks)](
            *(logits, logits.stride(0), truncates if record else num_sampled, num_sampled, sums, counts, chunk_ids),
            self._vocab_size,
            CHUNK=_CHUNK,
            **shape,
        )
        routes = self._buffers
        kernels.finish_step[(num_rows + -(-num_tokens * self._row_ids // _BLOCK),)](
            *(logits, logits.stride(0), sampled, sums, counts, chunk_ids),
            *((packed, 0) if bits is None else (bits, bits.stride(0))),
            *((packed, packed) if routes is None else (routes.slots, routes.ids)),
            *(packed, *layout, num_rows, self._num_chunks, room, self._vocab_size, num_tokens, self._row_ids),
            CHUNKS=1 << (self._num_chunks - 1).bit_length(),
            ROUTE_BYTES=0 if routes is None else self._dtype.itemsize,
            **shape,
        )
        return packed, bits

    def _pack_on_cpu(
        self,
        logits: Tensor,
        sampled: Tensor,
        num_sampled: Tensor,
        truncates: Tensor | None,
        num_tokens: int,
        layout: _Layout,
    ) -> tuple[Tensor, None]:
        logits = logits.float()
        num_rows, kept = len(logits), np.empty((0, 0), bool)
        if truncates is not None:
            rows = torch.nonzero((truncates != 0) & (num_sampled > 0))[:, 0].numpy()
            kept = np.isfinite(logits.numpy()[rows])
        ids = np.nonzero(kept)[1]
        packed = np.zeros(layout.ids + len(ids), np.int32)
        packed[layout.ids :] = ids
        if truncates is not None:
            packed[rows] = kept.sum(-1)
        logprobs = logits.gather(-1, sampled[:, None])[:, 0] - logits.logsumexp(-1)
        packed[layout.logprobs : layout.logprobs + num_rows] = logprobs.numpy().view(np.int32)
        if self._buffers is not None:
            slots, ids = (buffer[:num_tokens].numpy() for buffer in self._buffers[:2])
            packed[layout.slots : layout.routes].view(np.int64)[:num_tokens] = slots
            packed[layout.routes : layout.ids].view(self._dtype)[: ids.size] = ids.reshape(-1)
        return torch.from_numpy(packed), None


def _rounded(num_words: int) -> int:
    """To 16 bytes."""
    return -(-num_words // 4) * 4
