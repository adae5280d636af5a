"""Runs in, a Markdown table and a figure out. Knows nothing of what was varied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

Rows = Sequence[Mapping[str, Any]]
Runs = Mapping[str, Sequence[Rows]]
"""Label of a variant -> its runs, one per seed."""

COLORS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7")
"""Of Okabe and Ito: told apart by any eye."""
SMOOTHING = 5
"""Steps of the trailing mean in the figure."""


@dataclass(frozen=True, slots=True)
class Column:
    """One number per run."""

    title: str
    read: Callable[[Rows], float]
    form: str


def values(rows: Rows, key: str) -> list[float]:
    """A metric over the steps that have it, in order."""
    return [row[key] for row in rows if row.get(key) is not None]


def print_table(runs: Runs, columns: Sequence[Column]) -> None:
    """One row per variant: mean over the seeds, and their range in brackets."""
    print("| | " + " | ".join(column.title for column in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for label, seeds in runs.items():
        cells = [_cell([column.read(rows) for rows in seeds], column.form) for column in columns]
        print(f"| {label} | " + " | ".join(cells) + " |")


def _cell(numbers: Sequence[float], form: str) -> str:
    if any(isnan(number) for number in numbers):
        return "-"
    mean, low, high = (form.format(number) for number in (fmean(numbers), min(numbers), max(numbers)))
    return f"{mean} [{low}, {high}]" if len(numbers) > 1 else mean


def draw_panels(runs: Runs, panels: Mapping[str, str], path: Path, *, logarithmic: frozenset[str]) -> None:
    """Writes an SVG with one panel per metric: mean over seeds, trailing mean over steps; for the first two, the range
    of the seeds as a band.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "keel", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot

    columns = 2
    grid, axes = pyplot.subplots(-(-len(panels) // columns), columns, figsize=(9, 11), layout="constrained")
    for index, (axis, (key, title)) in enumerate(zip(axes.flat, panels.items(), strict=True)):
        for color, (label, seeds) in zip(COLORS, runs.items(), strict=False):
            _draw(axis, seeds, key, label, color, with_band=index < columns)
        axis.set_title(title, loc="left")
        axis.set_yscale("log" if key in logarithmic else "linear")
        axis.grid(alpha=0.25)
    grid.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.savefig(path, metadata={"Date": None})


def _draw(axis: Any, seeds: Sequence[Rows], key: str, label: str, color: str, *, with_band: bool) -> None:
    curves = [_smooth([(row["step"], row[key]) for row in rows if row.get(key) is not None]) for rows in seeds]
    steps = sorted(set().union(*curves))
    if not steps:
        return
    found = [[curve[step] for curve in curves if step in curve] for step in steps]
    axis.plot(steps, [fmean(numbers) for numbers in found], color=color, label=label, linewidth=1.4)
    if with_band:
        lows, highs = [min(numbers) for numbers in found], [max(numbers) for numbers in found]
        axis.fill_between(steps, lows, highs, color=color, alpha=0.08, linewidth=0)


def _smooth(points: Sequence[tuple[int, float]]) -> dict[int, float]:
    """Step -> mean of the points of the last `SMOOTHING` steps."""
    return {step: fmean(value for other, value in points if step - SMOOTHING < other <= step) for step, _ in points}
