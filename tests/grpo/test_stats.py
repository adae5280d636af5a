"""Mergeable statistics against numpy on the whole data."""

from __future__ import annotations

import numpy as np
import pytest

from grpo.stats import StepStats


def test_merged_parts_equal_the_whole():
    rng = np.random.default_rng(0)
    parts = [rng.lognormal(-6, 2, n).astype(np.float32) for n in (1000, 0, 377)]
    merged = StepStats()
    for part in parts:
        stats = StepStats()
        stats.add("x", part)
        stats.add_mismatch(part)
        merged.merge(stats)
    whole = np.concatenate(parts).astype(np.float64)
    assert merged.mean("x") == pytest.approx(whole.mean())
    assert merged.maximum("x") == pytest.approx(whole.max())
    for percent in (50, 99):
        assert merged.mismatch_percentile(percent) == pytest.approx(np.percentile(whole, percent), rel=0.07)


def test_values_by_domain():
    stats = StepStats()
    stats.add_by_domain("kl", np.array([1.0, 2.0, 6.0]), np.array(["a", "b", "a"]), ("a", "b", "c"))
    assert (stats.mean("kl"), stats.mean("kl/a"), stats.mean("kl/b")) == (3.0, 3.5, 2.0)
    assert np.isnan(stats.mean("kl/c"))


def test_nothing_recorded_is_not_a_number():
    assert np.isnan(StepStats().mean("x")) and np.isnan(StepStats().mismatch_percentile(99))
