"""What sampling leaves behind: taken in by engine step, given out by sequence.

A step is put aside as it is. A window of steps is sorted by sequence, and added to what there is of each, in a thread
of its own; so the engine's thread does hardly anything per step, and nothing per token.

Shapes: B = rows of a step, T = sampled tokens of a sequence, N = kept ids, R = rows of several steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from rollout.types import KeptSets

_WINDOW_STEPS = 48


class StepSets(NamedTuple):
    """The kept sets of one step's rows, in any order, with or without gaps between them."""

    ids: np.ndarray  # int32 [N], possibly with room to spare
    sizes: np.ndarray  # int32 [B]
    starts: np.ndarray  # int32 | int64 [B], where each row's set begins


class StepRows(Protocol):
    """What a step has sampled. It has to stay as it is until nothing here refers to it."""

    @property
    def logprobs(self) -> np.ndarray:
        """Float32 [B]."""
        ...

    @property
    def sets(self) -> StepSets | None:
        """None if no row of the step is recorded."""
        ...


@dataclass(frozen=True, slots=True)
class SequenceLog:
    """What was sampled for one sequence. The arrays may be views of somewhat more memory."""

    logprobs: np.ndarray  # float32 [T]
    versions: np.ndarray  # int32 [T], the weights that drew each token
    kept: KeptSets | None
    """None where no sets are recorded. A row that was not truncated is an empty set."""


class _Step(NamedTuple):
    """A step that is put aside."""

    keys: np.ndarray
    version: int
    rows: StepRows


class _Rows(NamedTuple):
    """Some rows."""

    columns: np.ndarray  # int32 [3, R]: the bits of the log-probabilities, versions, sizes of the kept sets
    ids: np.ndarray  # int32, the sets one after the other


class _Column:
    """An array that grows along its last axis, in room that is used again: fresh memory costs more than the copy."""

    def __init__(self, dtype: type, *shape: int) -> None:
        self._room = np.empty((*shape, 1024), dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def values(self) -> np.ndarray:
        """A view, good until the column is cleared or extended."""
        return self._room[..., : self._length]

    def extend(self, num_more: int) -> np.ndarray:
        """The view of so many new values, to be filled."""
        start, self._length = self._length, self._length + num_more
        if self._length > self._room.shape[-1]:
            room = np.empty((*self._room.shape[:-1], 2 * self._length), self._room.dtype)
            room[..., :start] = self._room[..., :start]
            self._room = room
        return self._room[..., start : self._length]

    def clear(self) -> None:
        self._length = 0


class _Columns:
    """The rows of some steps, in the steps' order."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.keys = _Column(np.int64)
        self.ids = _Column(np.int32)
        self._rows = _Column(np.int32, 3)
        self._starts = _Column(np.int64)
        self._places = _Column(np.int64)
        self._gathered = _Column(np.int32)

    def append(self, steps: list[_Step]) -> None:
        """Copies what the steps refer to."""
        if not steps:
            return
        lengths = [len(step.keys) for step in steps]
        total = sum(lengths)
        np.concatenate([step.keys for step in steps], out=self.keys.extend(total))
        logprobs, versions, sizes = self._rows.extend(total)
        np.concatenate([step.rows.logprobs for step in steps], out=logprobs.view(np.float32))
        versions[:] = np.repeat([step.version for step in steps], lengths)
        starts = self._starts.extend(total)
        sizes[:], starts[:] = 0, 0
        stop = 0
        for step, length in zip(steps, lengths, strict=True):
            first, stop = stop, stop + length
            if (sets := step.rows.sets) is not None:
                sizes[first:stop] = sets.sizes
                np.add(sets.starts, len(self.ids), out=starts[first:stop])
                num_ids = int((sets.starts + sets.sizes).max())
                self.ids.extend(num_ids)[:] = sets.ids[:num_ids]
        self.num_steps += len(steps)

    def gather(self, rows: np.ndarray) -> _Rows:
        """These rows with their sets. The ids are good until the next call."""
        gathered = self._rows.values[:, rows]
        sizes = gathered[2]
        filled = sizes > 0
        starts, ends = self._starts.values[rows[filled]], np.cumsum(sizes[filled], dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        self._places.clear()
        self._gathered.clear()
        places, ids = self._places.extend(total), self._gathered.extend(total)
        if total:
            # Steps of one inside a set, and from the end of a set to the start of the next.
            places[:] = 1
            places[0] = starts[0]
            places[ends[:-1]] = starts[1:] - (starts + sizes[filled])[:-1] + 1
            np.cumsum(places, out=places)
            np.take(self.ids.values, places, out=ids, mode="clip")
        return _Rows(gathered, ids)

    def clear(self) -> None:
        for column in (self.keys, self.ids, self._rows, self._starts):
            column.clear()
        self.num_steps = 0


class _Sequence:
    """What there is of one sequence. Its columns and ids are as those of `_Rows`."""

    def __init__(self) -> None:
        self._columns = _Column(np.int32, 3)
        self._ids = _Column(np.int32)

    def append(self, columns: np.ndarray, ids: np.ndarray) -> None:
        self._columns.extend(columns.shape[1])[:] = columns
        self._ids.extend(len(ids))[:] = ids

    def read(self, *, has_sets: bool) -> SequenceLog:
        """Views, good for as long as nothing is appended."""
        logprobs, versions, sizes = self._columns.values
        kept = None
        if has_sets:
            offsets = np.zeros(len(sizes) + 1, np.int64)
            np.add.accumulate(sizes, out=offsets[1:])
            kept = KeptSets(offsets, self._ids.values)
        return SequenceLog(logprobs.view(np.float32), versions, kept)


class StepLog:
    """Takes in steps, gives out sequences. A sequence is known by an integer key of the caller's, 0 or above."""

    def __init__(self, *, keeps_sets: bool) -> None:
        self._keeps_sets = keeps_sets
        self._pending: list[_Step] = []
        self._columns = _Columns()
        """Of the steps before the pending ones that are not sorted yet."""
        self._taken: set[int] = set()
        """Sequences that have gone while these columns have rows of theirs."""
        self._sequences: dict[int, _Sequence] = {}
        """The sorter's while it is at work."""
        self._sorter = ThreadPoolExecutor(1, thread_name_prefix="keel-step-log")
        self._sorting: list[Future[None]] = []
        self._spare: list[_Columns] = []

    def add(self, keys: np.ndarray, version: int, rows: StepRows) -> None:
        """One step: row i is the next token of the sequence `keys[i]`, int64 [B]; a row of key -1 does not count."""
        self._pending.append(_Step(keys, version, rows))
        if self._columns.num_steps + len(self._pending) >= _WINDOW_STEPS:
            self._sorting.append(self._sorter.submit(self._sort, self._columns, self._pending, self._taken))
            self._columns = self._spare.pop() if self._spare else _Columns()
            self._pending, self._taken = [], set()

    def take(self, keys: Sequence[int]) -> list[SequenceLog]:
        """Everything added for these sequences, which are forgotten here."""
        self._columns.append(self._pending)
        self._pending = []
        all_keys = self._columns.keys.values
        rows = np.flatnonzero(all_keys == keys[0] if len(keys) == 1 else np.isin(all_keys, keys))
        if len(rows):
            self._taken.update(keys)
        for sorting in self._sorting:
            sorting.result()
        self._sorting.clear()
        self._distribute(self._columns, rows)
        return [self._sequences.pop(key, _Sequence()).read(has_sets=self._keeps_sets) for key in keys]

    def _sort(self, columns: _Columns, steps: list[_Step], taken: set[int]) -> None:
        """In the sorter's thread, to which all of this belongs."""
        columns.append(steps)
        keys = columns.keys.values
        counts = keys >= 0
        if taken:
            counts &= np.isin(keys, list(taken), invert=True)
        self._distribute(columns, np.flatnonzero(counts))
        columns.clear()
        self._spare.append(columns)

    def _distribute(self, columns: _Columns, rows: np.ndarray) -> None:
        """Adds these rows to their sequences."""
        keys = columns.keys.values[rows]
        order = np.argsort(keys, kind="stable")
        keys, sorted_rows = keys[order], columns.gather(rows[order])
        cuts = np.flatnonzero(np.diff(keys, prepend=-1, append=-1))
        ends = np.concatenate([[0], np.cumsum(sorted_rows.columns[2], dtype=np.int64)])[cuts].tolist()
        for key, span, ids in zip(keys[cuts[:-1]].tolist(), pairwise(cuts.tolist()), pairwise(ends), strict=True):
            sequence = self._sequences.get(key)
            if sequence is None:
                sequence = self._sequences[key] = _Sequence()
            sequence.append(sorted_rows.columns[:, slice(*span)], sorted_rows.ids[slice(*ids)])
