"""What a step's sampling leaves on the device: each row's log-probability, and the support of the rows that truncate.

On a GPU two kernels read the truncated logits once (`support_kernels.py`); on a CPU torch and numpy do. Either way the
supports come as one run of ids. What does not fit in its room is read from a bit per id of the vocabulary instead: no
bound changes a record.

Shapes: B = rows, V = vocabulary, N = ids of all supports.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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


class StepSample(NamedTuple):
    """One step's sampling on the host."""

    logprobs: np.ndarray  # float32 [B]
    sets: StepSets | None
    """Rows that do not truncate, or have sampled nothing, are empty; None if no row of the step is recorded."""


@dataclass(frozen=True)
class StepSupports:
    """One step's sampling, on its way to the host."""

    packed: Tensor
    """int32 [R + R + N], R = B rounded up: sizes of the supports, negative where their ids are incomplete; the bits of
    the float32 log-probabilities; the ids. N = 0 if nothing is recorded."""
    num_rows: int
    bits: Tensor | None = None  # uint8 [B, ceil(V / 8)], stays on the device
    copy_stream: torch.cuda.Stream | None = None

    def to_host(self) -> StepSupports:
        """Begins the copy on the current stream. `self` has to be kept until it is done."""
        if self.packed.device.type == "cpu":
            return self
        packed = self.packed.to("cpu", non_blocking=True)
        return replace(self, packed=packed, copy_stream=torch.cuda.current_stream())

    def read(self) -> StepSample:
        """The step's arrays, once the copy is done. They are copies: the memory copied to is soon used again."""
        packed, stride = self.packed.numpy(), _rounded(self.num_rows)
        logprobs = packed[stride : stride + self.num_rows].view(np.float32).copy()
        ids = packed[2 * stride :]
        if not len(ids):
            return StepSample(logprobs, None)
        signed = packed[: self.num_rows].astype(np.int64)
        sizes = np.abs(signed)
        total = int(sizes.sum())
        complete = total <= len(ids) and signed.min() >= 0
        return StepSample(logprobs, StepSets(ids[:total].copy() if complete else self._complete(ids, signed), sizes))

    def _complete(self, ids: np.ndarray, signed: np.ndarray) -> np.ndarray:
        """Takes the rows that had no room from the vocabulary's bits."""
        assert self.bits is not None
        ends = np.cumsum(np.abs(signed))
        missing = np.empty(max(ends[-1] - len(ids), 0), np.int32)
        rows = np.split(np.concatenate([ids, missing])[: ends[-1]], ends[:-1])
        for row in np.flatnonzero((signed < 0) | (ends > len(ids))).tolist():
            # On the stream of the other copies: on the default one, this would wait for the step in progress.
            with torch.cuda.stream(self.copy_stream):
                bits = self.bits[row].cpu().numpy()
            rows[row] = np.flatnonzero(np.unpackbits(bits, bitorder="little")).astype(np.int32)
        return np.concatenate(rows)


class SupportMeter:
    """Measures the sampling of steps of at most `max_rows` rows over a vocabulary of `vocab_size` ids.

    On a GPU it holds the memory that the two kernels pass results through; steps on one stream may share it.
    """

    def __init__(self, *, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._num_chunks = -(-vocab_size // _CHUNK)
        self._scratch: tuple[Tensor, ...] = ()
        if device.type != "cpu":
            self._scratch = self._make_scratch(max_rows, device)

    def __call__(
        self,
        logits: Tensor,  # float32 [B, V]; -inf = removed by truncation
        sampled: Tensor,  # int64 [B]
        num_sampled: Tensor,  # int32 [B]: 0 = nothing was sampled, the row's token means nothing
        truncates: Tensor | None,  # int32 [B]: 0 = the row's support is the vocabulary; None = record nothing
    ) -> StepSupports:
        """log softmax(logits)[sampled] of every row; the ids of finite logit where a row truncates and has sampled."""
        if self._scratch:
            return self._measure_on_gpu(logits, sampled, num_sampled, truncates)
        return _measure_on_cpu(logits, sampled, num_sampled, truncates)

    def _make_scratch(self, max_rows: int, device: torch.device) -> tuple[Tensor, ...]:
        chunks = max_rows * self._num_chunks
        sums = torch.empty(chunks, 2, dtype=torch.float32, device=device)
        counts = torch.empty(chunks, dtype=torch.int32, device=device)
        return sums, counts, torch.empty(chunks, _CHUNK_ROOM, dtype=torch.int32, device=device)

    def _measure_on_gpu(
        self, logits: Tensor, sampled: Tensor, num_sampled: Tensor, truncates: Tensor | None
    ) -> StepSupports:
        from rollout.vllm_plugin import support_kernels

        kernels: Any = support_kernels  # a launch is not typed
        num_rows, record = len(logits), truncates is not None
        stride, num_ids = _rounded(num_rows), num_rows * _ROW_ROOM if record else 0
        packed = torch.empty(2 * stride + num_ids, dtype=torch.int32, device=logits.device)
        sizes, logprobs, ids = packed[:stride], packed[stride : 2 * stride].view(torch.float32), packed[2 * stride :]
        shape = (num_rows if record else 1, -(-self._vocab_size // 8))
        bits = torch.empty(shape, dtype=torch.uint8, device=logits.device)
        sums, counts, chunk_ids = self._scratch
        flags = truncates if record else num_sampled
        room: dict[str, Any] = {"WIDTH": _CHUNK_ROOM, "RECORD": record}
        kernels.scan_chunks[(num_rows, self._num_chunks)](
            *(logits, logits.stride(0), flags, num_sampled, sums, counts, chunk_ids, bits, bits.stride(0)),
            self._vocab_size,
            CHUNK=_CHUNK,
            BLOCK=_BLOCK,
            **room,
        )
        kernels.join_chunks[(num_rows,)](
            *(logits, logits.stride(0), sampled, sums, counts, chunk_ids, logprobs, sizes, ids),
            self._num_chunks,
            num_ids,
            CHUNKS=1 << (self._num_chunks - 1).bit_length(),
            **room,
        )
        return StepSupports(packed, num_rows, bits if record else None)


def _measure_on_cpu(logits: Tensor, sampled: Tensor, num_sampled: Tensor, truncates: Tensor | None) -> StepSupports:
    logits = logits.float()
    num_rows, stride = len(logits), _rounded(len(logits))
    small = torch.zeros(2, stride, dtype=torch.int32)
    small[1, :num_rows] = (logits.gather(-1, sampled[:, None])[:, 0] - logits.logsumexp(-1)).view(torch.int32)
    if truncates is None:
        return StepSupports(small.flatten(), num_rows)
    rows = torch.nonzero((truncates != 0) & (num_sampled > 0))[:, 0]
    kept = np.isfinite(logits.numpy()[rows.numpy()])
    small[0, rows] = torch.from_numpy(kept.sum(-1, dtype=np.int32))
    return StepSupports(torch.cat([small.flatten(), torch.from_numpy(np.nonzero(kept)[1].astype(np.int32))]), num_rows)


def _rounded(num_rows: int) -> int:
    """Keeps what follows aligned to 16 bytes; Triton compiles anew for what is not."""
    return -(-num_rows // 4) * 4
