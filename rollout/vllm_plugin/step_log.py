"""What sampling leaves behind, kept by engine step while it is written and by sequence when it is read.

A step adds a few arrays for its whole batch, whatever the batch's size. They are sorted by sequence once per window of
steps; so hardly any work is done per token and sequence.

Shapes: B = rows of a step, T = sampled tokens of a sequence, N = kept ids.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rollout.types import KeptSets

_WINDOW_STEPS = 64
_WINDOW_IDS = 1 << 20
"""Kept ids that a window may hold."""


class StepSets(NamedTuple):
    """The kept sets of one step's rows, one after the other."""

    ids: np.ndarray  # int32 [N]
    sizes: np.ndarray  # int64 [B]


@dataclass(frozen=True, slots=True)
class SequenceLog:
    """What was sampled for one sequence."""

    logprobs: np.ndarray  # float32 [T]
    versions: np.ndarray  # int32 [T], the weights that drew each token
    kept: KeptSets | None
    """None where no sets are recorded. A row that was not truncated is an empty set."""


class _Piece(NamedTuple):
    """A stretch of one sequence, or the rows of one step."""

    logprobs: np.ndarray
    versions: np.ndarray
    sizes: np.ndarray  # int64, of the kept sets
    ids: np.ndarray


class StepLog:
    """Takes in steps, gives out sequences. A sequence is known by an integer key of the caller's."""

    def __init__(self, *, keeps_sets: bool) -> None:
        self._keeps_sets = keeps_sets
        self._steps: list[tuple[np.ndarray, _Piece]] = []
        self._taken: set[int] = set()
        """Sequences that have gone while the window still has rows of theirs."""
        self._num_ids = 0
        self._pieces: dict[int, list[_Piece]] = {}
        self._places, self._ids = np.empty(0, np.int64), np.empty(0, np.int32)

    def add(
        self,
        keys: np.ndarray,  # int64 [B]
        logprobs: np.ndarray,  # float32 [B]
        version: int,
        sets: StepSets | None,
        rows: np.ndarray | None = None,  # int64 [rows]
    ) -> None:
        """One step: row i is the next token of the sequence `keys[i]`; with `rows`, only these rows count.

        The arrays are kept and must not change.
        """
        ids, sizes = sets or StepSets(np.empty(0, np.int32), np.zeros(len(keys), np.int64))
        piece = _Piece(logprobs, np.full(len(keys), version, np.int32), sizes, ids)
        if rows is not None:
            keys, piece = keys[rows], self._take_rows(piece, rows)
            piece = piece._replace(ids=piece.ids.copy())
        self._steps.append((keys, piece))
        self._num_ids += len(ids)
        if len(self._steps) >= _WINDOW_STEPS or self._num_ids >= _WINDOW_IDS:
            self.sort_window()

    def take(self, key: int) -> SequenceLog:
        """Everything added for a sequence, which is forgotten here.

        For many at a time, `sort_window` first: then the window is walked once, not once for each.
        """
        log = _join([*self._pieces.pop(key, []), *self._find_in_window(key)])
        kept = None
        if self._keeps_sets:
            offsets = np.zeros(len(log.sizes) + 1, np.int64)
            np.cumsum(log.sizes, out=offsets[1:])
            kept = KeptSets(offsets, log.ids)
        return SequenceLog(log.logprobs, log.versions, kept)

    def sort_window(self) -> None:
        """Moves what the last steps brought to where it is kept by sequence."""
        if not self._steps:
            return
        keys = np.concatenate([keys for keys, _ in self._steps])
        window = _join([piece for _, piece in self._steps])
        self._steps.clear()
        self._num_ids = 0
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        window = self._take_rows(window, order)
        cuts = np.concatenate([[0], np.flatnonzero(np.diff(keys)) + 1, [len(keys)]])
        ends = np.concatenate([[0], np.cumsum(window.sizes)])[cuts].tolist()
        for i, (first, stop) in enumerate(itertools.pairwise(cuts.tolist())):
            # Copies: a sequence that is kept does not keep the others' memory.
            logprobs, versions, sizes = (array[first:stop].copy() for array in window[:3])
            piece = _Piece(logprobs, versions, sizes, window.ids[ends[i] : ends[i + 1]].copy())
            if (key := int(keys[first])) not in self._taken:
                self._pieces.setdefault(key, []).append(piece)
        self._taken.clear()

    def _find_in_window(self, key: int) -> list[_Piece]:
        """The sequence's rows in steps that are not sorted yet."""
        pieces, row, keys = [], -1, None
        for step_keys, piece in self._steps:
            if step_keys is not keys:
                keys, found = step_keys, np.flatnonzero(step_keys == key)
                row = int(found[0]) if len(found) else -1
            if row >= 0:
                rows, start = slice(row, row + 1), int(piece.sizes[:row].sum())
                ids = piece.ids[start : start + int(piece.sizes[row])]
                pieces.append(_Piece(piece.logprobs[rows], piece.versions[rows], piece.sizes[rows], ids))
        if pieces:
            self._taken.add(key)
        return pieces

    def _take_rows(self, piece: _Piece, rows: np.ndarray) -> _Piece:
        """These rows, with their sets one after the other; the ids are good until the next call."""
        sizes = piece.sizes[rows]
        starts = (np.cumsum(piece.sizes) - piece.sizes)[rows]
        filled = sizes > 0
        starts, ends = starts[filled], np.cumsum(sizes[filled])
        total = int(ends[-1]) if len(ends) else 0
        if total > len(self._places):  # room that is used again: memory fresh from the system costs more than the work
            self._places, self._ids = np.empty(2 * total, np.int64), np.empty(2 * total, np.int32)
        places, ids = self._places[:total], self._ids[:total]
        if total:
            # Steps of one inside a set, and from the end of a set to the start of the next.
            places.fill(1)
            places[0] = starts[0]
            places[ends[:-1]] = starts[1:] - (starts + sizes[filled])[:-1] + 1
            np.cumsum(places, out=places)
            np.take(piece.ids, places, out=ids, mode="clip")
        return _Piece(piece.logprobs[rows], piece.versions[rows], sizes, ids)


def _join(pieces: list[_Piece]) -> _Piece:
    empty = _Piece(np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int32))
    return _Piece(*(np.concatenate(arrays) for arrays in zip(empty, *pieces, strict=True)))
