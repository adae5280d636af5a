"""Routes kept where the KV cache keeps its values: one row per cache slot.

A step's routes are written under the slots that its tokens' keys and values went to. So the routes of a sequence are
read by its block table, those of a cached prefix are there already, and a block that is given away is overwritten in
the order in which the device overwrites it.

Shapes: T = tokens of a step, L = decoder layers, K = experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rollout.vllm_plugin.host_kernels import write_routes
from rollout.vllm_plugin.support import StepRecord


class Stretch(NamedTuple):
    """Positions of a sequence, from `start` to before `stop`."""

    blocks: list[int]
    """The sequence's, from its first position on."""
    start: int
    stop: int


class SlotRoutes:
    """The routes of every token in a KV cache of `num_blocks` blocks of `block_size` tokens.

    Memory is reserved with the first step, for all slots, and used as the cache fills. A row [L, K] is one opaque value
    here. A step is written as it comes (`host_kernels.py`): to hand the interpreter to a thread that writes, and to get
    it back, takes longer.
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._rows = np.empty((0, 0), np.uint8)  # [slots, bytes]
        self._blocks: np.ndarray | None = None  # [blocks]
        """The same memory. A block is one value to numpy, which copies it whole."""
        self._shape: tuple[int, ...] = ()
        self._dtype = np.dtype(np.uint8)

    def write(self, step: StepRecord) -> None:
        """The routes of one step's tokens, if it has any."""
        if not step.route_shape:
            return
        num_tokens, *shape = step.route_shape
        if self._blocks is None:
            self._reserve(tuple(shape), step.route_dtype)
        write_routes(self._rows, step.packed, step.layout.slots, step.layout.routes, num_tokens)

    def _reserve(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        num_slots, num_bytes = self._num_blocks * self._block_size, math.prod(shape) * dtype.itemsize
        self._rows = np.empty((num_slots, num_bytes), np.uint8)
        self._blocks = self._rows.reshape(-1).view(np.dtype((np.void, self._block_size * num_bytes)))

    def copy_block(self, source: int, destination: int) -> None:
        """Follows a copy of one cache block to another."""
        if self._blocks is not None:
            self._blocks[destination] = self._blocks[source]

    def read(self, stretches: Sequence[Stretch]) -> list[np.ndarray]:
        """Rows [stop - start, L, K] of each: views of one copy."""
        if self._blocks is None:
            raise ValueError("no routes have been written yet")
        size, needed, places = self._block_size, [], []
        for blocks, start, stop in stretches:
            first = start // size
            place = len(needed) * size + start - first * size
            places.append((place, place + stop - start))
            needed += blocks[first : -(-stop // size)]
        rows = self._blocks[needed].view(self._dtype).reshape(-1, *self._shape)
        return [rows[first:stop] for first, stop in places]
