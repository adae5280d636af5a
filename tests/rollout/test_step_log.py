"""The log of steps and the routes by cache slot, against the same bookkeeping done token by token."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from rollout.vllm_plugin import step_log
from rollout.vllm_plugin.slot_routes import SlotRoutes
from rollout.vllm_plugin.step_log import StepLog, StepSets

Token = tuple[float, int, list[int]]
"""Log-probability, weight version, kept set."""


def add_random_step(
    log: StepLog, rng: np.random.Generator, keys: np.ndarray, version: int, expected: dict[int, list[Token]]
) -> None:
    """A step of some sequences in any order, some rows of which do not count, some sets empty."""
    order = rng.permutation(keys)
    sizes = rng.integers(0, 6, len(order)) * rng.integers(0, 2, len(order))
    sets = [np.sort(rng.choice(1000, size, replace=False)).astype(np.int32) for size in sizes]
    logprobs = rng.random(len(order), np.float32)
    counts = rng.random(len(order)) < rng.choice([0.7, 2])
    ids = np.concatenate([np.empty(0, np.int32), *sets])
    log.add(np.where(counts, order, -1), logprobs, version, StepSets(ids, sizes))
    for row in np.flatnonzero(counts):
        expected[int(order[row])].append((float(logprobs[row]), version, sets[row].tolist()))


@pytest.mark.parametrize(
    ("steps", "ids"), [(64, 1 << 20), (3, 1 << 20), (64, 10)], ids=["wide", "few steps", "few ids"]
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
            check(log, live.pop(int(rng.integers(12))), expected)
    log.sort_window()
    for key in live:
        check(log, key, expected)
    assert len(log.take(99).logprobs) == 0  # a sequence that never was


def check(log: StepLog, key: int, expected: dict[int, list[Token]]) -> None:
    tokens = expected.pop(key, [])
    taken: Any = log.take(key)
    assert taken.logprobs.tolist() == [logprob for logprob, _, _ in tokens]
    assert taken.versions.tolist() == [version for _, version, _ in tokens]
    assert [taken.kept.row(t).tolist() for t in range(len(tokens))] == [kept for _, _, kept in tokens]


def test_without_sets() -> None:
    log = StepLog(keeps_sets=False)
    log.add(np.array([3, 1]), np.array([-1.0, -2.0], np.float32), 7, None)
    taken = log.take(1)
    assert taken.kept is None and taken.logprobs.tolist() == [-2.0] and taken.versions.tolist() == [7]


def test_routes_are_read_by_block_table() -> None:
    routes = SlotRoutes(num_blocks=10, block_size=4)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 8, (11, 2, 3)).astype(np.uint8)
    table = [7, 2, 5]
    slots = np.array([table[i // 4] * 4 + i % 4 for i in range(11)])
    routes.write(slots[:9], rows[:9])
    routes.write(slots[9:], rows[9:])
    for start, stop in ((0, 11), (3, 9), (4, 8), (10, 11), (5, 5)):
        np.testing.assert_array_equal(routes.read(table, start, stop), rows[start:stop])
    whole = routes.read(table, 0, 11)
    routes.copy_block(2, 9)
    routes.write(np.array([2 * 4]), rows[:1])  # the block is given to another
    np.testing.assert_array_equal(routes.read([7, 9, 5], 0, 11), rows)
    np.testing.assert_array_equal(whole, rows)
    assert not np.array_equal(routes.read(table, 0, 11), rows)


def test_routes_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="no routes have been written"):
        SlotRoutes(num_blocks=2, block_size=4).read([0], 0, 3)
