"""What sampling leaves behind: taken in by engine step, given out by sequence.

A step is put aside as it is. A window of steps is sorted by sequence in a thread of its own; so the engine's thread
does hardly anything per step, and nothing per token. The thread hardly ever needs the interpreter, which both share:
what there is to do for each sequence alone waits until it is asked for. Once half of a window's sequences have gone,
the others are copied out before long, and its memory is used again.

Shapes: B = rows of a step, T = sampled tokens of a sequence, N = kept ids, R = rows of several steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, pairwise
from operator import itemgetter
from typing import NamedTuple, Protocol
from weakref import finalize

import numpy as np

from rollout.types import KeptSets

_WINDOW_STEPS = 48
_WINDOW_IDS = 1 << 23
"""Kept ids for which there may be room in a window's steps; it ends with the step that exceeds it."""
_MOST_RESERVED = 1 << 23
"""Ids of sequences that may end at once for which memory is held ready."""
_MOST_IDLE = 2
"""Blocks of such memory that are kept when nothing refers to them any more."""
_PAGE_IDS = 1 << 10
"""In a page of memory."""


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

    @property
    def room(self) -> int:
        """The length of the sets' ids."""
        ...


@dataclass(frozen=True, slots=True)
class SequenceLog:
    """What was sampled for one sequence. Sequences that end one after the other share memory, up to 48 MiB of it."""

    logprobs: np.ndarray  # float32 [T]
    versions: np.ndarray  # int32 [T], the weights that drew each token
    kept: KeptSets | None
    """None where no sets are recorded. A row that was not truncated is an empty set."""


class _Step(NamedTuple):
    """A step that is put aside."""

    keys: np.ndarray
    version: int
    rows: StepRows


class _Sampled(NamedTuple):
    """Some rows."""

    rows: np.ndarray  # int32 [3 R]: of each the bits of its log-probability, its version, and the size of its kept set
    ids: np.ndarray  # int32, the sets one after the other


_Span = tuple[int, int, int, int]
"""Of one sequence among some rows: from where to where the rows go, and the ids."""
_Piece = tuple[_Sampled, _Span]


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
        sets = [step.rows.sets or _no_sets(length) for step, length in zip(steps, lengths, strict=True)]
        starts = self._starts.extend(total)
        np.concatenate([step.sizes for step in sets], out=sizes)
        np.concatenate([step.starts for step in sets], out=starts)
        num_ids = np.maximum.reduceat(starts + sizes, np.cumsum([0, *lengths[:-1]]))
        starts += np.repeat(len(self.ids) + np.cumsum(num_ids) - num_ids, lengths)
        ids = [step.ids[:used] for step, used in zip(sets, num_ids.tolist(), strict=True)]
        np.concatenate(ids, out=self.ids.extend(int(num_ids.sum())))
        self.num_steps += len(steps)

    def sort(self, rows: np.ndarray, find_room: Callable[[int], np.ndarray]) -> _Window:
        """These rows by their sequences, with their sets in the room, int32, that is found for so many ids."""
        keys = self.keys.values[rows]
        order = np.argsort(keys, kind="stable")
        return _Window(keys[order], self._gather(rows[order], find_room))

    def _gather(self, rows: np.ndarray, find_room: Callable[[int], np.ndarray]) -> _Sampled:
        columns = self._rows.values[:, rows]
        sizes = columns[2]
        filled = sizes > 0
        starts, ends = self._starts.values[rows[filled]], np.cumsum(sizes[filled], dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        ids = find_room(total)[:total]
        if total:
            self._places.clear()
            places = self._places.extend(total)
            # Steps of one inside a set, and from the end of a set to the start of the next.
            places[:] = 1
            places[0] = starts[0]
            places[ends[:-1]] = starts[1:] - (starts + sizes[filled])[:-1] + 1
            np.cumsum(places, out=places)
            np.take(self.ids.values, places, out=ids, mode="clip")
        return _Sampled(columns.T.ravel(), ids)

    def clear(self) -> None:
        for column in (self.keys, self.ids, self._rows, self._starts):
            column.clear()
        self.num_steps = 0


def _no_sets(num_rows: int) -> StepSets:
    zeros = np.zeros(num_rows, np.int32)
    return StepSets(zeros[:0], zeros, zeros)


class _Window:
    """Rows in the order of their sequences."""

    def __init__(self, keys: np.ndarray, sampled: _Sampled) -> None:
        self.sampled = sampled
        cuts = np.flatnonzero(np.diff(keys, prepend=-1, append=-1))
        ends = np.concatenate([[0], np.cumsum(sampled.rows[2::3], dtype=np.int64)])[cuts].tolist()
        keys, cuts = keys[cuts[:-1]].tolist(), cuts.tolist()
        self.spans: dict[int, _Span] = dict(zip(keys, zip(cuts, cuts[1:], ends, ends[1:], strict=False), strict=False))
        """By the sequence's key; whoever takes a sequence takes its span."""
        self._num_sequences = len(keys)

    def is_mostly_gone(self) -> bool:
        """Whether no more than half of the sequences are left."""
        return 2 * len(self.spans) <= self._num_sequences


class _Reserve:
    """Memory for ids that are given out. To get it from the system takes longer than to fill it.

    So it is got ahead of time, in blocks, and a block that nothing refers to any more is used again.
    """

    def __init__(self) -> None:
        self._room = np.empty(0, np.int32)
        """What is left of the block in use."""
        self._idle: deque[np.ndarray] = deque(maxlen=_MOST_IDLE)

    def take(self, num_ids: int) -> np.ndarray:
        """An int32 array to be filled; of new memory if there is not enough."""
        room = self._room
        if num_ids > len(room):
            return np.empty(num_ids, np.int32)
        self._room = room[num_ids:]
        return room[:num_ids]

    def prepare(self, num_ids: int) -> None:
        """Sees to room for so many, up to a bound, and gets half as much again. In another thread than `take`."""
        num_ids = min(num_ids, _MOST_RESERVED)
        if len(self._room) < num_ids:
            block = self._find_block(num_ids)
            self._room = np.frombuffer(block.data, np.int32)  # what is taken refers to this, and not to the block
            finalize(self._room, self._idle.append, block).atexit = False

    def _find_block(self, num_ids: int) -> np.ndarray:
        while self._idle:
            if len(block := self._idle.pop()) >= num_ids:
                return block
        block = np.empty(num_ids + num_ids // 2, np.int32)
        block[::_PAGE_IDS] = 0
        return block


class StepLog:
    """Takes in steps, gives out sequences. A sequence is known by an integer key of the caller's, 0 or above."""

    def __init__(self, *, keeps_sets: bool) -> None:
        self._keeps_sets = keeps_sets
        self._pending: list[_Step] = []
        self._columns = _Columns()
        """Of the steps before the pending ones that are not in a window yet."""
        self._room = 0
        """Of both."""
        self._taken: set[int] = set()
        """Sequences that have gone while these columns have rows of theirs."""
        self._windows: dict[int, Future[_Window]] = {}
        """By number, on their way to being sorted."""
        self._numbers = count()
        self._copied: dict[int, list[tuple[int, _Piece]]] = {}
        """What windows have left behind, by key: their number and the piece."""
        self._sorter = ThreadPoolExecutor(1, thread_name_prefix="keel-step-log")
        self._spare: list[_Columns] = []
        self._rooms: list[np.ndarray] = []
        """Memory for a window's ids, int32, that is free; only the sorter takes from here."""
        self._reserve = _Reserve()

    def add(self, keys: np.ndarray, version: int, rows: StepRows) -> None:
        """One step: row i is the next token of the sequence `keys[i]`, int64 [B], B > 0; a row of -1 does not count."""
        self._pending.append(_Step(keys, version, rows))
        self._room += rows.room
        if self._columns.num_steps + len(self._pending) >= _WINDOW_STEPS or self._room > _WINDOW_IDS:
            self._close_window()

    def take(self, keys: Sequence[int]) -> list[SequenceLog]:
        """Everything added for these sequences, which are forgotten here."""
        self._columns.append(self._pending)
        self._pending = []
        latest = self._find_latest(keys)
        windows = [(number, window.result()) for number, window in self._windows.items()]
        sequences = []
        for key in keys:
            numbered = self._copied.pop(key, [])
            for number, window in windows:
                if (span := window.spans.pop(key, None)) is not None:
                    numbered.append((number, (window.sampled, span)))
            numbered.sort(key=itemgetter(0))
            pieces = [piece for _, piece in numbered]
            if (span := latest.spans.get(key)) is not None:
                pieces.append((latest.sampled, span))
            sequences.append(pieces)
        return self._join(sequences)

    def _find_latest(self, keys: Sequence[int]) -> _Window:
        """These sequences' rows of the columns, where they are counted as taken."""
        columns = self._columns
        rows = np.flatnonzero(np.isin(columns.keys.values, keys))
        if len(rows):
            self._taken.update(keys)
        return columns.sort(rows, lambda num_ids: np.empty(num_ids, np.int32))

    def _join(self, sequences: list[list[_Piece]]) -> list[SequenceLog]:
        """The pieces of each sequence, one after the other: a copy."""
        spans = np.array([span for pieces in sequences for _, span in pieces], np.int64).reshape(-1, 4)
        ends = np.cumsum(np.diff(spans)[:, ::2], axis=0)
        num_rows, num_ids = ends[-1].tolist() if len(ends) else (0, 0)
        rows, ids = np.empty(3 * num_rows, np.int32), self._reserve.take(num_ids)
        # Numpy gives up the interpreter for a copy of more than 500 ids, and another thread waits for it.
        to_rows, to_ids, row, first_id = rows.data, ids.data, 0, 0
        pieces = (piece for pieces in sequences for piece in pieces)
        for (sampled, (start, stop, start_id, stop_id)), (next_row, next_id) in zip(pieces, ends.tolist(), strict=True):
            to_rows[3 * row : 3 * next_row] = sampled.rows.data[3 * start : 3 * stop]
            to_ids[first_id:next_id] = sampled.ids.data[start_id:stop_id]
            row, first_id = next_row, next_id
        return self._split(_Sampled(rows, ids), [len(pieces) for pieces in sequences], ends)

    def _split(self, sampled: _Sampled, num_pieces: list[int], ends: np.ndarray) -> list[SequenceLog]:
        """Each sequence's share of the joined pieces, which end at rows and ids `ends`, int64 [pieces, 2]."""
        bounds = np.concatenate([[[0, 0]], ends])[np.cumsum([0, *num_pieces])]
        logprobs, versions, sizes = np.ascontiguousarray(sampled.rows.reshape(-1, 3).T)
        logprobs, totals = logprobs.view(np.float32), np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        logs = []
        for (first, first_id), (stop, stop_id) in pairwise(bounds.tolist()):
            offsets, ids = totals[first : stop + 1] - first_id, sampled.ids[first_id:stop_id]
            kept = KeptSets(offsets, ids) if self._keeps_sets else None
            logs.append(SequenceLog(logprobs[first:stop], versions[first:stop], kept))
        return logs

    def _close_window(self) -> None:
        """Has the steps sorted, and begins another window. Waits if the one before is not sorted yet."""
        if self._windows:
            next(reversed(self._windows.values())).result()
        self._clear_out()
        num_held = sum([len(window.result().sampled.ids) for window in self._windows.values()])
        sorting = self._sorter.submit(self._sort, self._columns, self._pending, self._taken, num_held)
        self._windows[next(self._numbers)] = sorting
        self._columns = self._spare.pop() if self._spare else _Columns()
        self._pending, self._taken, self._room = [], set(), 0

    def _sort(self, columns: _Columns, steps: list[_Step], taken: set[int], num_held: int) -> _Window:
        """In the sorter's thread, to which these belong. The windows before hold `num_held` ids."""
        columns.append(steps)
        keys = columns.keys.values
        counts = keys >= 0
        if taken:
            counts &= np.isin(keys, list(taken), invert=True)
        window = columns.sort(np.flatnonzero(counts), self._find_room)
        columns.clear()
        self._spare.append(columns)
        self._reserve.prepare(num_held + len(window.sampled.ids))
        return window

    def _find_room(self, num_ids: int) -> np.ndarray:
        for i, room in enumerate(self._rooms):
            if len(room) >= num_ids:
                return self._rooms.pop(i)
        return np.empty(1 << num_ids.bit_length(), np.int32)

    def _clear_out(self) -> None:
        """Gives up the windows that are empty for the most part.

        Not as sequences are taken: those of a batch end within a few steps, and the last would be copied for nothing.
        """
        for number, sorting in list(self._windows.items()):
            if not (window := sorting.result()).is_mostly_gone():
                continue
            rows, ids = window.sampled
            for key, (first, stop, first_id, stop_id) in window.spans.items():
                left = _Sampled(rows[3 * first : 3 * stop].copy(), ids[first_id:stop_id].copy())
                span = 0, stop - first, 0, stop_id - first_id
                self._copied.setdefault(key, []).append((number, (left, span)))
            if (room := ids.base) is not None:
                self._rooms.append(room)
            del self._windows[number]
