"""Packed steps as their layout says, in numpy alone: how tests write and read them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rollout.vllm_plugin.support import Layout, StepRecord


class StepSets(NamedTuple):
    """The supports of a step's rows."""

    ids: np.ndarray  # int32 [N]
    sizes: np.ndarray  # int32 [B]
    starts: np.ndarray  # int32 [B], where each row's support begins


def read_logprobs(step: StepRecord, num_rows: int) -> np.ndarray:
    """Float32 [B]."""
    return step.packed[step.layout.logprobs :][:num_rows].view(np.float32)


def read_sets(step: StepRecord, num_rows: int) -> StepSets | None:
    """None if no support is recorded."""
    packed, at = step.packed, step.layout
    if len(packed) == at.ids:
        return None
    return StepSets(packed[at.ids :], packed[:num_rows], packed[at.starts :][:num_rows])


def read_routes(step: StepRecord) -> tuple[np.ndarray, np.ndarray]:
    """Int64 [T], and uint8 | uint16 [T, L, K]."""
    packed, at, shape = step.packed, step.layout, step.route_shape
    routes = packed[at.routes : at.ids].view(step.route_dtype)[: int(np.prod(shape))].reshape(shape)
    return packed[at.slots : at.routes].view(np.int64)[: shape[0]], routes


def pack_rows(logprobs: np.ndarray, sets: StepSets | None) -> StepRecord:
    """A step without routes; without sets, what is in their place means nothing."""
    num_rows, nothing = len(logprobs), np.empty(0, np.int32)
    ids, sizes, starts = sets or (nothing, np.full(num_rows, -7, np.int32), np.full(num_rows, -7, np.int32))
    layout = Layout(num_rows, 2 * num_rows, 3 * num_rows, 3 * num_rows, 3 * num_rows)
    packed = np.concatenate([sizes, starts, logprobs.view(np.int32), ids])
    return StepRecord(packed, layout, (), np.dtype(np.uint8))


def pack_routes(slots: np.ndarray, routes: np.ndarray) -> StepRecord:
    """A step of these routes, uint8 | uint16 [T, L, K], alone."""
    words = routes.tobytes()
    words += bytes(-len(words) % 4)
    packed = np.concatenate([slots.astype(np.int64).view(np.int32), np.frombuffer(words, np.int32)])
    return StepRecord(packed, Layout(0, 0, 0, 2 * len(slots), len(packed)), routes.shape, routes.dtype)
