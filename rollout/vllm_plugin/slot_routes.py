"""Routes kept where the KV cache keeps its values: one row per cache slot.

A step's routes are written under the slots that its tokens' keys and values went to. So the routes of a sequence are
read by its block table, those of a cached prefix are there already, and a block that is given away is overwritten in
the order in which the device overwrites it.

Shapes: T = tokens of a step, L = decoder layers, K = experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class StepRoutes(NamedTuple):
    """The routes of one step's tokens, and the cache slots that the tokens' keys and values went to."""

    slots: np.ndarray  # int64 [T]
    routes: np.ndarray  # uint8 | uint16 [T, L, K], contiguous


class Stretch(NamedTuple):
    """Positions of a sequence, from `start` to before `stop`."""

    blocks: list[int]
    """The sequence's, from its first position on."""
    start: int
    stop: int


class SlotRoutes:
    """The routes of every token in a KV cache of `num_blocks` blocks of `block_size` tokens.

    Memory is reserved with the first step, for all slots, and used as the cache fills. A row [L, K] is one opaque value
    here, which numpy copies whole. A step is written as it comes: to hand the interpreter to a thread that writes, and
    to get it back, takes several times as long.
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._blocks: np.ndarray | None = None  # [blocks, tokens]
        self._shape: tuple[int, ...] = ()
        self._dtype = np.dtype(np.uint8)

    def write(self, step: StepRoutes) -> None:
        """The routes of one step's tokens. Of two rows for one slot the later stays: numpy assigns in order."""
        routes = step.routes
        if self._blocks is None:
            self._shape, self._dtype = routes.shape[1:], routes.dtype
            self._blocks = np.empty((self._num_blocks, self._block_size), np.dtype((np.void, routes[0].nbytes)))
        self._blocks.reshape(-1)[step.slots] = routes.reshape(-1).view(self._blocks.dtype)

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
