"""What sampling leaves behind, kept by engine step while it is written and by sequence when it is read.

A step adds a few arrays for its whole batch, whatever the batch's size. They are sorted by sequence once per window of
steps; so hardly any work is done per token and sequence. Once half of a sorted window's sequences have gone, the others
are copied out before long, and its memory is used again.

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
    sizes: np.ndarray  # int32 [B]


@dataclass(frozen=True, slots=True)
class SequenceLog:
    """What was sampled for one sequence."""

    logprobs: np.ndarray  # float32 [T]
    versions: np.ndarray  # int32 [T], the weights that drew each token
    kept: KeptSets | None
    """None where no sets are recorded. A row that was not truncated is an empty set."""


class _Piece(NamedTuple):
    """A stretch of one sequence, or rows of a window."""

    logprobs: np.ndarray
    versions: np.ndarray
    sizes: np.ndarray  # int32, of the kept sets
    ids: np.ndarray


class _Column:
    """An array that grows, in room that is used again: memory fresh from the system costs more than the copy."""

    def __init__(self, dtype: type) -> None:
        self._room = np.empty(1024, dtype)
        self._length = 0

    @property
    def values(self) -> np.ndarray:
        """A view, good until the column is cleared or appended to."""
        return self._room[: self._length]

    def append(self, values: np.ndarray) -> None:
        stop = self._length + len(values)
        if stop > len(self._room):
            room = np.empty(2 * stop, self._room.dtype)
            room[: self._length] = self.values
            self._room = room
        self._room[self._length : stop] = values
        self._length = stop

    def clear(self) -> None:
        self._length = 0


class _Window:
    """Some steps, sorted by sequence."""

    def __init__(self, number: int, keys: np.ndarray, rows: _Piece, room: np.ndarray) -> None:
        self.number = number
        self.room = room
        """What `rows.ids` lie in."""
        self._rows = rows
        cuts = np.flatnonzero(np.diff(keys, prepend=-1, append=-1))
        ends = np.concatenate([[0], np.cumsum(rows.sizes)])[cuts].tolist()
        stretches = zip(itertools.pairwise(cuts.tolist()), itertools.pairwise(ends), strict=True)
        self.sequences = dict(zip(keys[cuts[:-1]].tolist(), stretches, strict=True))
        """Key -> its rows and its ids."""
        self.num_sequences = len(self.sequences)

    def read(self, key: int) -> _Piece:
        """Views."""
        (first, stop), (first_id, stop_id) = self.sequences[key]
        logprobs, versions, sizes, ids = self._rows
        return _Piece(logprobs[first:stop], versions[first:stop], sizes[first:stop], ids[first_id:stop_id])


class StepLog:
    """Takes in steps, gives out sequences. A sequence is known by an integer key of the caller's, 0 or above."""

    def __init__(self, *, keeps_sets: bool) -> None:
        self._keeps_sets = keeps_sets
        self._num_steps = 0
        """Since windows were last cleared out."""
        self._keys = _Column(np.int64)
        self._logprobs, self._versions = _Column(np.float32), _Column(np.int32)
        self._sizes, self._ids = _Column(np.int32), _Column(np.int32)
        self._taken: set[int] = set()
        """Sequences that have gone while the steps not sorted yet have rows of theirs."""
        self._numbers = itertools.count()
        self._windows: list[_Window] = []
        self._copied: dict[int, list[tuple[int, _Piece]]] = {}
        """What windows have left behind, by key: their number and the stretch."""
        self._places = np.empty(0, np.int64)
        self._rooms: list[np.ndarray] = []
        """Memory for ids, int32, that is free."""

    def add(
        self,
        keys: np.ndarray,  # int64 [B]
        logprobs: np.ndarray,  # float32 [B]
        version: int,
        sets: StepSets | None,
    ) -> None:
        """One step: row i is the next token of the sequence `keys[i]`; a row of key -1 does not count."""
        self._keys.append(keys)
        self._logprobs.append(logprobs)
        self._versions.append(np.full(len(keys), version, np.int32))
        if sets is None:
            sets = StepSets(np.empty(0, np.int32), np.zeros(len(keys), np.int32))
        self._sizes.append(sets.sizes)
        self._ids.append(sets.ids)
        self._num_steps += 1
        if self._num_steps >= _WINDOW_STEPS or len(self._ids.values) >= _WINDOW_IDS:
            self._num_steps = 0
            self.sort_window()
            self._clear_out()

    def take(self, key: int) -> SequenceLog:
        """Everything added for a sequence, which is forgotten here.

        For many at a time, `sort_window` first: then the last steps are walked once, not once for each.
        """
        numbered = self._copied.pop(key, [])
        for window in self._windows:
            if key in window.sequences:
                numbered.append((window.number, window.read(key)))
                del window.sequences[key]
        numbered.sort(key=lambda item: item[0])
        pieces = [piece for _, piece in numbered]
        rows = np.flatnonzero(self._keys.values == key)
        if len(rows):
            self._taken.add(key)
        room = None
        if len(rows) or not pieces:
            piece, room = self._take_rows(rows)
            pieces.append(piece)
        log = _Piece(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))  # a copy in any case
        if room is not None:
            self._rooms.append(room)
        kept = None
        if self._keeps_sets:
            offsets = np.zeros(len(log.sizes) + 1, np.int64)
            np.cumsum(log.sizes, out=offsets[1:])
            kept = KeptSets(offsets, log.ids)
        return SequenceLog(log.logprobs, log.versions, kept)

    def sort_window(self) -> None:
        """Sorts the last steps by sequence."""
        order = np.argsort(self._keys.values, kind="stable")
        order = order[np.count_nonzero(self._keys.values < 0) :]
        if len(order):
            rows, room = self._take_rows(order)
            window = _Window(next(self._numbers), self._keys.values[order], rows, room)
            for key in self._taken:
                window.sequences.pop(key, None)
            self._windows.append(window)
        self._taken.clear()
        for column in (self._keys, self._logprobs, self._versions, self._sizes, self._ids):
            column.clear()

    def _clear_out(self) -> None:
        """Gives up the windows that are empty for the most part.

        Not as sequences are taken: those of a batch end within a few steps, and the last would be copied for nothing.
        """
        for window in self._windows:
            if 2 * len(window.sequences) <= window.num_sequences:
                for key in window.sequences:
                    copy = _Piece(*(array.copy() for array in window.read(key)))
                    self._copied.setdefault(key, []).append((window.number, copy))
                window.sequences.clear()
                self._rooms.append(window.room)
        self._windows = [window for window in self._windows if window.sequences]

    def _take_rows(self, rows: np.ndarray) -> tuple[_Piece, np.ndarray]:
        """These rows of the last steps, with their sets one after the other; and the room that the ids lie in."""
        all_sizes = self._sizes.values
        sizes = all_sizes[rows]
        starts = (np.cumsum(all_sizes, dtype=np.int64) - all_sizes)[rows]
        filled = sizes > 0
        starts, ends = starts[filled], np.cumsum(sizes[filled], dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        room = self._find_room(total)
        if total:
            # Steps of one inside a set, and from the end of a set to the start of the next.
            if total > len(self._places):
                self._places = np.empty(2 * total, np.int64)
            places = self._places[:total]
            places.fill(1)
            places[0] = starts[0]
            places[ends[:-1]] = starts[1:] - (starts + sizes[filled])[:-1] + 1
            np.cumsum(places, out=places)
            np.take(self._ids.values, places, out=room[:total], mode="clip")
        return _Piece(self._logprobs.values[rows], self._versions.values[rows], sizes, room[:total]), room

    def _find_room(self, num_ids: int) -> np.ndarray:
        for i, room in enumerate(self._rooms):
            if len(room) >= num_ids:
                return self._rooms.pop(i)
        return np.empty(1 << num_ids.bit_length(), np.int32)
