"""The log of steps and the routes by cache slot, against the same bookkeeping done token by token."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from rollout.vllm_plugin import step_log
from rollout.vllm_plugin.slot_routes import SlotRoutes, Stretch
from rollout.vllm_plugin.step_log import SequenceLog, StepLog
from tests.rollout.packed_steps import StepSets, pack_routes, pack_rows

Token = tuple[float, int, list[int]]
"""Log-probability, weight version, kept set."""


def add_random_step(
    log: StepLog, rng: np.random.Generator, keys: list[int], version: int, expected: dict[int, list[Token]]
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
    step = pack_rows(logprobs, StepSets(ids, sizes.astype(np.int32), starts))
    log.add(np.where(counts, order, -1), version, step)
    for row in np.flatnonzero(counts):
        expected[int(order[row])].append((float(logprobs[row]), version, sets[row].tolist()))


@pytest.fixture(params=[3, 4, 7, 1024])
def small_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of as many words, and so little room that everything grows."""
    monkeypatch.setattr(step_log, "_PAGE_WORDS", request.param)
    monkeypatch.setattr(step_log, "_FIRST_PAGES", 4)
    monkeypatch.setattr(step_log, "_FIRST_SEQUENCES", 1)
    monkeypatch.setattr(step_log, "_BLOCK_IDS", 150)


@pytest.mark.usefixtures("small_memory")
def test_a_sequence_is_what_was_added_for_it() -> None:
    rng = np.random.default_rng(0)
    log, expected = StepLog(keeps_sets=True), defaultdict(list)
    live, taken = [log.begin() for _ in range(40)], []
    for step in range(150):
        add_random_step(log, rng, live[:12], step // 50, expected)
        if step % 7 == 0:
            for _ in range(1 + step % 3):
                taken.append(take(log, live.pop(int(rng.integers(12))), expected))
                live.append(log.begin())
    taken += [take(log, key, expected) for key in live[::-1]]
    assert not expected
    for sequence, tokens in taken:  # what was given out has stayed as it was
        check(sequence, tokens)
    check(log.take(log.begin()), [])


def take(log: StepLog, key: int, expected: dict[int, list[Token]]) -> tuple[SequenceLog, list[Token]]:
    sequence, tokens = log.take(key), expected.pop(key, [])
    check(sequence, tokens)
    return sequence, tokens


def check(sequence: SequenceLog, tokens: list[Token]) -> None:
    assert sequence.kept is not None
    assert sequence.logprobs.tolist() == [logprob for logprob, _, _ in tokens]
    assert sequence.versions.tolist() == [version for _, version, _ in tokens]
    assert [sequence.kept.row(t).tolist() for t in range(len(tokens))] == [kept for _, _, kept in tokens]


@pytest.mark.usefixtures("small_memory")
def test_room_is_used_again() -> None:
    """As many sequences at a time as before need no more pages; blocks are used again once nothing refers to them."""
    rng, log = np.random.default_rng(1), StepLog(keeps_sets=True)
    blocks, num_pages = {}, 0
    for batch in range(20):
        keys, expected = [log.begin() for _ in range(12)], defaultdict(list)
        for _ in range(20):
            add_random_step(log, rng, keys, 0, expected)
        for key in keys:
            kept = take(log, key, expected)[0].kept
            assert kept is not None
            lent: Any = kept.ids.base
            block = lent.base.obj
            blocks[id(block)] = block
        if batch == 1:
            num_pages = 2 * len(log._store.pages)
    assert len(log._store.pages) <= num_pages and log._store.num_free[0] == len(log._store.pages)
    assert 1 < len(blocks) <= 3


def test_without_sets() -> None:
    log = StepLog(keeps_sets=False)
    first, second = log.begin(), log.begin()
    log.add(np.array([first, second]), 7, pack_rows(np.array([-1.0, -2.0], np.float32), None))
    taken = log.take(second)
    assert taken.kept is None and taken.logprobs.tolist() == [-2.0] and taken.versions.tolist() == [7]


def test_routes_are_read_by_block_table() -> None:
    routes = SlotRoutes(num_blocks=10, block_size=4)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 8, (11, 2, 3)).astype(np.uint8)
    table = [7, 2, 5]
    slots = np.array([table[i // 4] * 4 + i % 4 for i in range(11)])
    routes.write(pack_routes(slots[:9], rows[:9]))
    routes.write(pack_routes(slots[9:], rows[9:]))
    spans = [(0, 11), (3, 9), (4, 8), (10, 11), (5, 5)]
    for (start, stop), read in zip(spans, routes.read([Stretch(table, *span) for span in spans]), strict=True):
        np.testing.assert_array_equal(read, rows[start:stop])
    (whole,) = routes.read([Stretch(table, 0, 11)])
    routes.copy_block(2, 9)
    routes.write(pack_routes(np.array([2 * 4]), rows[:1]))  # the block is given to another
    np.testing.assert_array_equal(routes.read([Stretch([7, 9, 5], 0, 11)])[0], rows)
    np.testing.assert_array_equal(whole, rows)
    assert not np.array_equal(routes.read([Stretch(table, 0, 11)])[0], rows)


def test_of_several_rows_for_one_slot_the_last_stays() -> None:
    routes, rng = SlotRoutes(num_blocks=3, block_size=4), np.random.default_rng(0)
    held = np.zeros((12, 2, 3), np.uint16)
    for step in range(50):
        slots, rows = rng.permutation(12)[:5], rng.integers(0, 999, (5, 2, 3)).astype(np.uint16)
        routes.write(pack_routes(slots, rows))
        held[slots] = rows
        if step % 9 == 8:
            source, destination = rng.permutation(3)[:2].tolist()
            routes.copy_block(source, destination)
            held[4 * destination :][:4] = held[4 * source :][:4]
    np.testing.assert_array_equal(routes.read([Stretch([0, 1, 2], 0, 12)])[0], held)


def test_routes_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="no routes have been written"):
        SlotRoutes(num_blocks=2, block_size=4).read([Stretch([0], 0, 3)])


def test_what_a_step_does_not_have_is_refused() -> None:
    log, routes = StepLog(keeps_sets=True), SlotRoutes(num_blocks=3, block_size=4)
    sets = StepSets(np.arange(5, dtype=np.int32), np.array([2, 3], np.int32), np.array([0, 3], np.int32))
    with pytest.raises(IndexError, match="ids that it does not have"):
        log.add(np.array([log.begin(), log.begin()]), 0, pack_rows(np.zeros(2, np.float32), sets))
    for slot in (-1, 12):
        with pytest.raises(IndexError, match="a cache slot that there is not"):
            routes.write(pack_routes(np.array([3, slot]), np.zeros((2, 2, 3), np.uint8)))
