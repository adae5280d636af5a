"""What a step leaves on the device, in one array: each row's log-probability, the support of the rows that truncate,
and the routes of the step's tokens.

On a GPU the kernels that draw also pack (`rollout/vllm_plugin/draw.py`); on a CPU `pack_on_cpu` reads what vLLM's
sampler has left. Either way the supports come as one run of ids. A row that does not fit in its room leaves a bit per
id of the vocabulary instead: no bound changes a record.

Shapes: B = rows, V = vocabulary, N = ids of all supports, T = tokens, L = decoder layers, K = experts per token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rollout.vllm_plugin.step_log import StepSets


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


class Layout(NamedTuple):
    """Where the parts of a packed step begin, counted in int32; each from 16 bytes on."""

    logprobs: int
    """Float32 [B]. The sizes of the supports come first: int32 [B], negative where the ids are elsewhere."""
    slots: int  # int64 [T]
    routes: int  # [T, L, K]
    ids: int  # int32 [N]


class PackedStep(NamedTuple):
    """One step on its way to the host. It stands in for vLLM's `SamplingMaskTensors` and has its two methods."""

    packed: Tensor  # int32
    layout: Layout
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


def lay_out(buffers: RouteBuffers | None, num_rows: int, num_tokens: int) -> Layout:
    """Of a step with `num_rows` rows and, with `buffers`, the routes of `num_tokens` tokens."""
    slots = 2 * _rounded(num_rows)
    if buffers is None:
        return Layout(slots // 2, slots, slots, slots)
    routes = slots + _rounded(2 * num_tokens)
    num_bytes = num_tokens * buffers.ids[0].numel() * buffers.dtype.itemsize
    return Layout(slots // 2, slots, routes, routes + _rounded(-(-num_bytes // 4)))


def name_parts(
    packed: Tensor, layout: Layout, num_rows: int, num_tokens: int, buffers: RouteBuffers | None, bits: Tensor | None
) -> PackedStep:
    """The step that `packed` holds."""
    if buffers is None:
        return PackedStep(packed, layout, num_rows, (), np.dtype(np.uint8), bits)
    return PackedStep(packed, layout, num_rows, (num_tokens, *buffers.ids.shape[1:]), buffers.dtype, bits)


def pack_on_cpu(
    logits: Tensor,  # float [B, V]; -inf = removed by truncation
    sampled: Tensor,  # int64 [B]
    num_sampled: Tensor,  # int32 [B]: 0 = nothing was sampled, the row's token means nothing
    truncates: np.ndarray | None,  # bool [B]: False = the row's support is the vocabulary; None = record no supports
    num_tokens: int,
    buffers: RouteBuffers | None,
) -> PackedStep:
    """log softmax(logits)[sampled] of every row; the ids of finite logit where a row truncates and has sampled."""
    logits = logits.float()
    num_rows, kept = len(logits), np.empty((0, 0), bool)
    layout = lay_out(buffers, num_rows, num_tokens)
    if truncates is not None:
        rows = np.flatnonzero(truncates & (num_sampled.numpy() > 0))
        kept = np.isfinite(logits.numpy()[rows])
    ids = np.nonzero(kept)[1]
    packed = np.zeros(layout.ids + len(ids), np.int32)
    packed[layout.ids :] = ids
    if truncates is not None:
        packed[rows] = kept.sum(-1)
    logprobs = logits.gather(-1, sampled[:, None])[:, 0] - logits.logsumexp(-1)
    packed[layout.logprobs : layout.logprobs + num_rows] = logprobs.numpy().view(np.int32)
    if buffers is not None:
        slots, ids = (buffer[:num_tokens].numpy() for buffer in buffers[:2])
        packed[layout.slots : layout.routes].view(np.int64)[:num_tokens] = slots
        packed[layout.routes : layout.ids].view(buffers.dtype)[: ids.size] = ids.reshape(-1)
    return name_parts(torch.from_numpy(packed), layout, num_rows, num_tokens, buffers, None)


def _rounded(num_words: int) -> int:
    """To 16 bytes."""
    return -(-num_words // 4) * 4
