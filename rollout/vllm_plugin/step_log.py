"""What sampling leaves behind: taken in by engine step, given out by sequence.

What a step has sampled is copied at once, row by row, to the streams of its sequences (`host_kernels.py`). That takes a
compiled loop some ten microseconds; a thread that sorts many steps at a time costs the engine's more than that in turns
at the interpreter.

Shapes: B = rows of a step, T = sampled tokens of a sequence.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from weakref import finalize

import numpy as np

from rollout.types import KeptSets
from rollout.vllm_plugin.host_kernels import (
    IDS,
    NUM_COLUMNS,
    TOKENS,
    Store,
    append_step,
    forget_sequence,
    read_sequence,
)
from rollout.vllm_plugin.support import StepRecord

_PAGE_WORDS = 1 << 10
_FIRST_PAGES, _FIRST_SEQUENCES = 1 << 12, 1 << 8
"""Room to begin with; it doubles as needed."""
_BLOCK_IDS = 1 << 22
"""Ids of sequences that are given out lie in blocks of so many."""
_MOST_IDLE = 8
"""Blocks that are kept when nothing refers to them any more."""


@dataclass(frozen=True, slots=True)
class SequenceLog:
    """What was sampled for one sequence. Sequences that end one after the other share memory, up to 16 MiB of it."""

    logprobs: np.ndarray  # float32 [T]
    versions: np.ndarray  # int32 [T], the weights that drew each token
    kept: KeptSets | None
    """None where no sets are recorded. A row that was not truncated is an empty set."""


class StepLog:
    """Takes in steps, gives out sequences."""

    def __init__(self, *, keeps_sets: bool) -> None:
        self._keeps_sets = keeps_sets
        self._store = _widened(_empty_store(), num_pages=_FIRST_PAGES, num_sequences=_FIRST_SEQUENCES)
        self._unused = list(range(_FIRST_SEQUENCES))
        self._memory = _Memory()

    def begin(self) -> int:
        """A key for a new sequence, 0 or above, until it is taken."""
        if not self._unused:
            held = len(self._store.sequences)
            self._store = _widened(self._store, num_sequences=held)
            self._unused += range(held, 2 * held)
        return self._unused.pop()

    def add(self, keys: np.ndarray, version: int, step: StepRecord) -> None:
        """One step: row i is the next token of the sequence `keys[i]`, int64 [B]; a row of -1 does not count."""
        packed, at = step.packed, step.layout
        while not append_step(self._store, keys, version, packed, at.starts, at.logprobs, at.ids):
            self._store = _widened(self._store, num_pages=len(self._store.pages))

    def take(self, key: int) -> SequenceLog:
        """Everything added for this sequence, which is forgotten here."""
        sequence = self._store.sequences[key]
        num_tokens, num_ids = int(sequence[TOKENS]), int(sequence[IDS])
        logprobs, versions = np.empty((2, num_tokens), np.int32)
        offsets, ids = np.empty(num_tokens + 1, np.int64), self._memory.take(num_ids)
        read_sequence(self._store, key, logprobs, versions, offsets, ids)
        self._unused.append(key)
        kept = KeptSets(offsets, ids) if self._keeps_sets else None
        return SequenceLog(logprobs.view(np.float32), versions, kept)


def _empty_store() -> Store:
    nothing = np.empty(0, np.int32)
    pages = nothing.reshape(0, _PAGE_WORDS)
    return Store(pages, nothing, nothing, np.zeros(1, np.int64), np.empty((0, NUM_COLUMNS), np.int64))


def _widened(store: Store, *, num_pages: int = 0, num_sequences: int = 0) -> Store:
    """The store with so many more free pages and empty sequences."""
    pages, num_free = len(store.pages), int(store.num_free[0])
    wider = Store(
        pages=_extended(store.pages, num_pages),
        links=_extended(store.links, num_pages),
        free=_extended(store.free, num_pages),
        num_free=store.num_free + num_pages,
        sequences=_extended(store.sequences, num_sequences),
    )
    wider.free[num_free : num_free + num_pages] = np.arange(pages, pages + num_pages)
    for key in range(len(store.sequences), len(wider.sequences)):
        forget_sequence(wider, key)
    return wider


def _extended(array: np.ndarray, num_more: int) -> np.ndarray:
    """With so many more rows, which hold anything; the array itself if there are none."""
    if not num_more:
        return array
    longer = np.empty((len(array) + num_more, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer


class _Memory:
    """Memory for ids that are given out: to get it from the system takes longer than to fill it.

    So it comes in blocks, and a block that nothing refers to any more is used again.
    """

    def __init__(self) -> None:
        self._room = np.empty(0, np.int32)
        """What is left of the block in use."""
        self._idle: deque[np.ndarray] = deque(maxlen=_MOST_IDLE)

    def take(self, num_ids: int) -> np.ndarray:
        """An int32 array to be filled."""
        if num_ids > _BLOCK_IDS:
            return np.empty(num_ids, np.int32)
        if num_ids > len(self._room):
            block = self._idle.pop() if self._idle else np.empty(_BLOCK_IDS, np.int32)
            self._room = np.frombuffer(block.data, np.int32)  # what is taken refers to this, and not to the block
            finalize(self._room, self._idle.append, block).atexit = False
        taken, self._room = self._room[:num_ids], self._room[num_ids:]
        return taken
