"""Sums that add up over micro-batches, updates and ranks, and become a step's metrics at the end.

A rank returns its `StepStats`; the driver merges them. Nothing here is a collective, so a metric can never hang a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

_EDGES = np.concatenate([[0.0], np.logspace(-9, 2, 441)])
"""Bin edges of the magnitude histogram: 40 per decade, so a percentile is within 6 % of the exact one."""


@dataclass(slots=True)
class Moments:
    """Count, sum and maximum of one quantity."""

    count: int = 0
    total: float = 0.0
    maximum: float = float("-inf")

    def add(self, values: np.ndarray) -> None:
        """Takes in a 1-D array."""
        if len(values):
            values = values.astype(np.float64)
            self.merge(Moments(len(values), float(values.sum()), float(values.max())))

    def merge(self, other: Moments) -> None:
        self.count += other.count
        self.total += other.total
        self.maximum = max(self.maximum, other.maximum)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else float("nan")


@dataclass(slots=True)
class StepStats:
    """Named moments, plus one histogram of |log pi_theta - log pi_old| on fresh tokens."""

    moments: dict[str, Moments] = field(default_factory=dict)
    mismatch_bins: np.ndarray = field(default_factory=lambda: np.zeros(len(_EDGES), np.int64))

    def add(self, name: str, values: np.ndarray) -> None:
        """Adds values under a name."""
        self.moments.setdefault(name, Moments()).add(values)

    def add_by_domain(self, name: str, values: np.ndarray, domains: np.ndarray, known: Iterable[str]) -> None:
        """Adds values under `name`, and under `name/domain` for each of the run's domains when there are several."""
        self.add(name, values)
        for domain in known:
            self.add(f"{name}/{domain}", values[domains == domain])

    def add_mismatch(self, magnitudes: np.ndarray) -> None:
        """Adds |log pi_theta - log pi_old| of tokens drawn by the very weights that score them."""
        self.add("mismatch", magnitudes)
        self.mismatch_bins += np.bincount(np.searchsorted(_EDGES, magnitudes), minlength=len(_EDGES) + 1)[: len(_EDGES)]

    def merge(self, other: StepStats) -> None:
        """Adds another rank's sums."""
        for name, moments in other.moments.items():
            self.moments.setdefault(name, Moments()).merge(moments)
        self.mismatch_bins += other.mismatch_bins

    def mean(self, name: str) -> float:
        return self.moments.get(name, Moments()).mean

    def maximum(self, name: str) -> float:
        moments = self.moments.get(name, Moments())
        return moments.maximum if moments.count else float("nan")

    def mismatch_percentile(self, percent: float) -> float:
        """Upper edge of the bin that holds the percentile; NaN without fresh tokens."""
        cumulative = self.mismatch_bins.cumsum()
        if not cumulative[-1]:
            return float("nan")
        edge = float(_EDGES[np.searchsorted(cumulative, percent / 100 * cumulative[-1])])
        return min(edge, self.maximum("mismatch"))
