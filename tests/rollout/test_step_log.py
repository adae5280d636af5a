"""The log of steps and the routes by cache slot, against the same bookkeeping done token by token."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest

from rollout.vllm_plugin import step_log
from rollout.vllm_plugin.slot_routes import SlotRoutes, StepRoutes, Stretch
from rollout.vllm_plugin.step_log import StepLog, StepSets


class Rows(NamedTuple):
    """A step's."""

    logprobs: np.ndarray
    sets: StepSets | None

    @property
    def room(self) -> int:
        """Of the sets."""
        return 0 if self.sets is None else len(self.sets.ids)


Token = tuple[float, int, list[int]]
"""Log-probability, weight version, kept set."""


def add_random_step(
    log: StepLog, rng: np.random.Generator, keys: np.ndarray, version: int, expected: dict[int, list[Token]]
) -> None:
    """A step of some sequences in any order, some rows of which do not count, some sets empty.

    The sets lie in any order, with room between them."""
    order = rng.permutation(keys)
    sizes = rng.integers(0, 6, len(order)) * rng.integers(0, 2, len(order))
    sets = [np.sort(rng.choice(1000, size, replace=False)).astype(np.int32) for size in sizes]
    logprobs = rng.random(len(order), np.float32)
    counts = rng.random(len(order)) < rng.choice([0.7, 2])
    ids, starts, stop = np.full(1000, -7, np.int32), np.zeros(len(order), np.int32), 0
    for row in rng.permutation(np.flatnonzero(sizes)):
        starts[row] = stop + rng.integers(0, 3)
        stop = starts[row] + sizes[row]
        ids[starts[row] : stop] = sets[row]
    log.add(np.where(counts, order, -1), version, Rows(logprobs, StepSets(ids, sizes.astype(np.int32), starts)))
    for row in np.flatnonzero(counts):
        expected[int(order[row])].append((float(logprobs[row]), version, sets[row].tolist()))


@pytest.mark.parametrize(
    ("steps", "ids"), [(48, 1 << 23), (3, 1 << 23), (1, 1 << 23), (48, 4500)], ids=["wide", "3", "1", "few ids"]
)
def test_a_sequence_is_what_was_added_for_it(monkeypatch: pytest.MonkeyPatch, steps: int, ids: int) -> None:
    monkeypatch.setattr(step_log, "_WINDOW_STEPS", steps)
    monkeypatch.setattr(step_log, "_WINDOW_IDS", ids)
    rng = np.random.default_rng(0)
    log, expected = StepLog(keeps_sets=True), defaultdict(list)
    live = list(range(40))
    for step in range(150):
        add_random_step(log, rng, np.array(live[:12]), step // 50, expected)
        if step % 7 == 0:
            check(log, [live.pop(int(rng.integers(12))) for _ in range(1 + step % 3)], expected)
            live += range(live[-1] + 1, live[-1] + 1 + 1 + step % 3)
    check(log, live[::-1], expected)
    assert not expected and len(log.take([99999])[0].logprobs) == 0  # a sequence that never was


def check(log: StepLog, keys: list[int], expected: dict[int, list[Token]]) -> None:
    taken: Any
    for key, taken in zip(keys, log.take(keys), strict=True):
        tokens = expected.pop(key, [])
        assert taken.logprobs.tolist() == [logprob for logprob, _, _ in tokens]
        assert taken.versions.tolist() == [version for _, version, _ in tokens]
        assert [taken.kept.row(t).tolist() for t in range(len(tokens))] == [kept for _, _, kept in tokens]


def test_a_window_ends_with_the_step_that_exceeds_its_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_log, "_WINDOW_IDS", 2000)
    rng, log = np.random.default_rng(2), StepLog(keeps_sets=True)
    for step in range(1, 10):  # with room for 1000 ids each
        add_random_step(log, rng, np.arange(4), 0, defaultdict(list))
        assert len(log._windows) == step // 3


def test_what_is_given_out_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_log, "_WINDOW_STEPS", 5)
    rng = np.random.default_rng(1)
    log, expected = StepLog(keeps_sets=True), defaultdict(list)
    for _ in range(40):
        add_random_step(log, rng, np.arange(6), 0, expected)
    (taken,) = log.take([3])
    assert taken.kept is not None
    arrays = taken.logprobs, taken.versions, taken.kept.ids, taken.kept.offsets
    before = [array.copy() for array in arrays]
    for _ in range(60):
        add_random_step(log, rng, np.arange(4, 10), 1, expected)
    log.take([4, 7])
    assert all(map(np.array_equal, arrays, before))


def test_without_sets() -> None:
    log = StepLog(keeps_sets=False)
    log.add(np.array([3, 1]), 7, Rows(np.array([-1.0, -2.0], np.float32), None))
    (taken,) = log.take([1])
    assert taken.kept is None and taken.logprobs.tolist() == [-2.0] and taken.versions.tolist() == [7]


def test_routes_are_read_by_block_table() -> None:
    routes = SlotRoutes(num_blocks=10, block_size=4)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 8, (11, 2, 3)).astype(np.uint8)
    table = [7, 2, 5]
    slots = np.array([table[i // 4] * 4 + i % 4 for i in range(11)])
    routes.write(StepRoutes(slots[:9], rows[:9]))
    routes.write(StepRoutes(slots[9:], rows[9:]))
    spans = [(0, 11), (3, 9), (4, 8), (10, 11), (5, 5)]
    for (start, stop), read in zip(spans, routes.read([Stretch(table, *span) for span in spans]), strict=True):
        np.testing.assert_array_equal(read, rows[start:stop])
    (whole,) = routes.read([Stretch(table, 0, 11)])
    routes.copy_block(2, 9)
    routes.write(StepRoutes(np.array([2 * 4]), rows[:1]))  # the block is given to another
    np.testing.assert_array_equal(routes.read([Stretch([7, 9, 5], 0, 11)])[0], rows)
    np.testing.assert_array_equal(whole, rows)
    assert not np.array_equal(routes.read([Stretch(table, 0, 11)])[0], rows)


def test_of_several_rows_for_one_slot_the_last_stays() -> None:
    routes, rng = SlotRoutes(num_blocks=3, block_size=4), np.random.default_rng(0)
    held = np.zeros((12, 2, 3), np.uint16)
    for step in range(50):
        slots, rows = rng.permutation(12)[:5], rng.integers(0, 999, (5, 2, 3)).astype(np.uint16)
        routes.write(StepRoutes(slots, rows))
        held[slots] = rows
        if step % 9 == 8:
            source, destination = rng.permutation(3)[:2].tolist()
            routes.copy_block(source, destination)
            held[4 * destination :][:4] = held[4 * source :][:4]
    np.testing.assert_array_equal(routes.read([Stretch([0, 1, 2], 0, 12)])[0], held)


def test_routes_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="no routes have been written"):
        SlotRoutes(num_blocks=2, block_size=4).read([Stretch([0], 0, 3)])
