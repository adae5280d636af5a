"""Metric numbers in, `metrics.jsonl` out (and TensorBoard events beside it), and back.

One JSON object per line: `step` plus one key per metric, for example `{"step": 3, "train/reward": 0.41}`. A number that
is not finite is written as null, so that every line is valid JSON and a curve shows a gap there. Knows nothing of what
the keys mean.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """The metrics of one run folder, appended step by step and flushed at once."""

    def __init__(self, run_dir: Path, *, tensorboard: bool) -> None:
        """
        Args:
            tensorboard: also write events to `run_dir/tensorboard`. On a resumed run they continue after the last row
                of `metrics.jsonl` (truncate that first).
        """
        rows = read_metrics(run_dir)
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = rows[-1]["step"] + 1 if rows else None
            self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one row; it is on its way to the disk when this returns."""
        row = {key: float(value) if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for key, value in row.items():
                if value is not None:
                    self._events.add_scalar(key, value, step)
            self._events.flush()

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All rows in order; an empty list where there is no file yet. Null values come back as None."""
    return read_rows(run_dir / METRICS_FILE)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a `.jsonl` file that is only ever appended to.

    A last line that a killed process left unfinished is not a row.

    Raises:
        ValueError: any other line is not JSON; names it.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    unfinished = lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{path}:{number}: not JSON ({error}): the file was changed; repair or remove that line"
            ) from None
    return rows + _read_unfinished(unfinished)


def _read_unfinished(line: bytes) -> list[dict[str, Any]]:
    """The row of a last line without its newline, if all else of it is there."""
    try:
        return [json.loads(line)]
    except ValueError:  # torn, or empty as it should be
        return []


def truncate_metrics(run_dir: Path, last_step: int) -> None:
    """Drops the rows after `last_step`: a resumed run draws those steps again."""
    truncate_rows(run_dir / METRICS_FILE, last_step)


def truncate_rows(path: Path, last_step: int) -> None:
    """Drops the rows of a `.jsonl` file whose `step` is above `last_step`, and a torn last line; all or nothing."""
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] <= last_step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    os.replace(partial, path)
