"""What a step leaves on the device, in one array: each row's log-probability, the support of the rows that truncate,
and the routes of the step's tokens.

On a GPU the kernels that draw also pack (`rollout/vllm_plugin/draw.py`); on a CPU `pack_on_cpu` reads what vLLM's
sampler has left. A row whose support does not fit in the room for ids leaves a bit per id of the vocabulary instead: no
bound changes a record.

Shapes: B = rows, V = vocabulary, N = ids of all supports, T = tokens, L = decoder layers, K = experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rollout.vllm_plugin.host_kernels import lacks_sets


class RouteBuffers(NamedTuple):
    """Where vLLM leaves a step's routes, and the cache slots of its tokens; the next step overwrites both."""

    slots: Tensor  # int64 [most tokens]
    ids: Tensor  # int32 [most tokens, L, K]
    dtype: np.dtype
    """Of the ids on the host: uint8 or uint16."""


class Layout(NamedTuple):
    """Where the parts of a packed step begin, counted in int32; each from 16 bytes on."""

    starts: int
    """Int32 [B]: where each support lies among the ids. The sizes are the first part: int32 [B], negative where the ids
    are elsewhere."""
    logprobs: int  # float32 [B]
    slots: int  # int64 [T]
    routes: int  # [T, L, K]
    ids: int  # int32 [N]


class StepRecord(NamedTuple):
    """One step on the host, all of it.

    Ends with the layout's `ids` if no support is recorded. Else the support of a row that does not truncate, or has
    sampled nothing, is empty.
    """

    packed: np.ndarray  # int32
    layout: Layout
    route_shape: tuple[int, ...]
    """T, L, K; empty without routes."""
    route_dtype: np.dtype


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
        """The step on the host, once the copy is done."""
        packed = self.packed.numpy()
        if self.bits is not None and lacks_sets(packed, self.num_rows):
            packed = self._complete(packed)
        return StepRecord(packed, self.layout, self.route_shape, self.route_dtype)

    def _complete(self, packed: np.ndarray) -> np.ndarray:
        """Takes the rows that had no room from the vocabulary's bits, and puts them behind the others."""
        assert self.bits is not None
        missing = np.flatnonzero(packed[: self.num_rows] < 0)
        # Beside the default stream, where this would wait for the step in progress.
        with torch.cuda.stream(torch.cuda.Stream() if self.bits.is_cuda else None):
            bits = self.bits[torch.from_numpy(missing).to(self.bits.device)].cpu().numpy()
        rows = [np.flatnonzero(np.unpackbits(flags, bitorder="little")).astype(np.int32) for flags in bits]
        sizes = np.array([len(row) for row in rows])
        completed = np.concatenate([packed, *rows])
        completed[missing] = sizes
        completed[self.layout.starts + missing] = len(packed) - self.layout.ids + np.cumsum(sizes) - sizes
        return completed


def lay_out(buffers: RouteBuffers | None, num_rows: int, num_tokens: int) -> Layout:
    """Of a step with `num_rows` rows and, with `buffers`, the routes of `num_tokens` tokens."""
    starts = _rounded(num_rows)
    logprobs, slots = 2 * starts, 3 * starts
    if buffers is None:
        return Layout(starts, logprobs, slots, slots, slots)
    routes = slots + _rounded(2 * num_tokens)
    num_bytes = num_tokens * buffers.ids[0].numel() * buffers.dtype.itemsize
    return Layout(starts, logprobs, slots, routes, routes + _rounded(-(-num_bytes // 4)))


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
        sizes = packed[:num_rows]
        sizes[rows] = kept.sum(-1)
        packed[layout.starts : layout.starts + num_rows] = np.cumsum(sizes) - sizes
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
