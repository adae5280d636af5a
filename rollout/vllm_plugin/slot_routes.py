"""Routes kept where the KV cache keeps its values: one row per cache slot.

A step's routes are written under the slots that its tokens' keys and values went to. So the routes of a sequence are
read by its block table, those of a cached prefix are there already, and a block that is given away is overwritten in
the order in which the device overwrites it.

Shapes: L = decoder layers, K = experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class SlotRoutes:
    """The routes of every token in a KV cache of `num_blocks` blocks of `block_size` tokens.

    Memory is reserved with the first step, for all slots, and used as the cache fills. A row [L, K] is one opaque value
    here, which numpy copies whole.
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._blocks: np.ndarray | None = None  # [blocks, tokens]
        self._shape: tuple[int, ...] = ()
        self._dtype = np.dtype(np.uint8)

    def write(
        self,
        slots: np.ndarray,  # int64 [tokens]
        routes: np.ndarray,  # uint8 | uint16 [tokens, L, K], contiguous
    ) -> None:
        """The routes of one step's tokens."""
        if self._blocks is None:
            self._shape, self._dtype = routes.shape[1:], routes.dtype
            row = np.dtype((np.void, routes[0].nbytes))
            self._blocks = np.empty((self._num_blocks, self._block_size), row)
        self._blocks.reshape(-1)[slots] = routes.reshape(-1).view(self._blocks.dtype)

    def copy_block(self, source: int, destination: int) -> None:
        """Follows a copy of one cache block to another."""
        if self._blocks is not None:
            self._blocks[destination] = self._blocks[source]

    def read(self, blocks: Sequence[int], start: int, stop: int) -> np.ndarray:
        """Rows [stop - start, L, K] of the positions `start` to `stop` of a sequence in these blocks; a copy."""
        if self._blocks is None:
            raise ValueError("no routes have been written yet")
        first = start // self._block_size
        needed = np.asarray(blocks[first : -(-stop // self._block_size)], np.int64)
        rows = self._blocks[needed].reshape(-1)[start - first * self._block_size : stop - first * self._block_size]
        return rows.view(self._dtype).reshape(-1, *self._shape)
