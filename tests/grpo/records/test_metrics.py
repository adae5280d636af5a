"""The metrics file: one valid JSON object per step, whatever happens to the process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo.records.metrics import METRICS_FILE, MetricsLog, read_metrics, truncate_metrics


def write_steps(run_dir: Path, *steps: int, tensorboard: bool = False) -> None:
    log = MetricsLog(run_dir, tensorboard=tensorboard)
    for step in steps:
        log.write(step, {"train/reward": step / 10})
    log.close()


def test_rows_come_back_in_order_and_are_flushed_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(1, {"train/reward": 0.5, "train/num_samples": 8})
    assert read_metrics(tmp_path) == [{"step": 1, "train/reward": 0.5, "train/num_samples": 8.0}]
    log.write(2, {"train/reward": 0.75})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    log.close()


def test_not_finite_is_null_in_valid_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(1, {"a": float("nan"), "b": float("-inf"), "c": 1.0})
    log.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse) == {
        "step": 1,
        "a": None,
        "b": None,
        "c": 1.0,
    }


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    truncate_metrics(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_torn_last_line_is_not_a_row(tmp_path: Path, cut: int) -> None:
    write_steps(tmp_path, 1, 2)
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-cut])
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == ([1, 2] if cut == 1 else [1])


def test_damage_elsewhere_is_an_error(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        read_metrics(tmp_path)


def test_truncation_drops_later_steps_and_the_torn_line(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3, 4)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "tr')
    truncate_metrics(tmp_path, 2)
    write_steps(tmp_path, 3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_tensorboard_has_the_same_numbers_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(tmp_path, 1, 2, 3, tensorboard=True)
    truncate_metrics(tmp_path, 2)
    log = MetricsLog(tmp_path, tensorboard=True)
    log.write(3, {"train/reward": 0.9, "train/kl": float("nan")})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/reward"]
    read = [(event.step, round(event.value, 6)) for event in events.Scalars("train/reward")]
    assert read == [(1, 0.1), (2, 0.2), (3, 0.9)]
