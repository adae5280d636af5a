"""The report: what it says about a run, and that the page stands on its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from grpo.commands.report import load_data, make_charts, write_report
from grpo.commands.verdicts import ends, judge
from grpo.config import ConfigError, load_config
from grpo.records.metrics import MetricsLog
from grpo.records.run_folder import begin_run
from tests.test_config import MINIMAL

NASTY = "</script><b>&amp; {{scripts}} 42"


def healthy(step: int) -> dict[str, float]:
    return {
        "train/reward": 0.3 + 0.01 * step,
        "train/ratio_mean": 1.001,
        "train/ratio_max": 1.5,
        "train/masked_sequences": 0.01,
        "train/entropy": 1.0 - 0.005 * step,
        "train/staleness_mean": 0.0,
        "train/staleness_max": 0.0,
        "train/zero_signal_groups": 4.0,
        "train/dropped_samples": 0.0,
        "mismatch/mean_abs": 1e-7,
        "mismatch/route_agreement": 0.999,
        "parity/max_mean_abs": 2e-7,
        "rollout/tokens_per_s": 1000.0,
        "time/step_s": 2.0,
        "time/generate_s": 1.5,
        "time/train_s": 0.5,
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_file = tmp_path / "train.toml"
    run_file.write_text(MINIMAL)
    overrides = (f"run.output_dir={tmp_path}", "run.steps=40", "rollout.dtype=float32", "learner.dtype=float32")
    return begin_run(load_config(run_file, overrides), run_file=run_file, resume=False)


def write_run(run_dir: Path, *, worse: dict[str, dict[int, float]] | None = None) -> None:
    log = MetricsLog(run_dir, tensorboard=False)
    for step in range(1, 41):
        metrics = healthy(step) | {key: at[step] for key, at in (worse or {}).items() if step in at}
        if step % 10 == 0:
            metrics["eval/accuracy"] = step / 50
        log.write(step, metrics)
    log.close()
    sample = {
        "step": 3,
        "group": 0,
        "sample": 1,
        "domain": "math",
        "prompt": "6*7=",
        "completion": NASTY,
        "answer": "42",
    }
    scores = {"reward": 1.0, "breakdown": {"exact": 1.0}, "advantage": 0.5, "num_tokens": 4, "finish_reason": "stop"}
    (run_dir / "samples.jsonl").write_text(json.dumps(sample | scores) + "\n")


def verdicts(run_dir: Path) -> dict[str, tuple[str, str]]:
    return {v["label"]: (v["value"], v["tone"]) for v in load_data(run_dir)["verdicts"]}


def test_a_healthy_run(run_dir: Path) -> None:
    write_run(run_dir)
    found = verdicts(run_dir)
    assert found["Reward"] == ("0.325 → 0.685", "good")
    assert found["Held-out accuracy"] == ("20.0% → 80.0%", "good")
    assert found["Worst mismatch"] == ("1.00e-07", "good")
    assert found["Without signal"] == ("12%", "neutral")  # 4 of 32 groups
    assert found["Speed"] == ("2.00 s", "neutral")
    assert not [label for label, (_, tone) in found.items() if tone == "bad"]


@pytest.mark.parametrize(
    ("key", "value", "label", "shown"),
    [
        ("mismatch/mean_abs", 0.3, "Worst mismatch", "3.00e-01"),
        ("parity/max_mean_abs", 0.2, "Weight sync", "2.00e-01"),
        ("train/ratio_mean", 0.8, "Ratio", "0.8000"),
        ("train/staleness_max", 2.0, "Staleness", "0.00"),
        ("train/dropped_samples", 5.0, "Dropped samples", "5"),
        ("train/loss", float("nan"), "Not finite", "1 values"),
        ("rollout/worker_restarts", 1.0, "Lost workers", "1"),
    ],
)
def test_one_bad_step_is_told(run_dir: Path, key: str, value: float, label: str, shown: str) -> None:
    write_run(run_dir, worse={key: {17: value}})
    data = load_data(run_dir)
    (verdict,) = [v for v in data["verdicts"] if v["label"] == label]
    assert (verdict["value"], verdict["tone"]) == (shown, "bad")
    if label in ("Worst mismatch", "Weight sync", "Ratio", "Not finite"):
        assert "step 17" in verdict["note"]


def test_collapse_of_entropy_and_reward(run_dir: Path) -> None:
    falling = {step: 1.0 / step**2 for step in range(1, 41)}
    write_run(run_dir, worse={"train/entropy": falling, "train/reward": falling})
    found = verdicts(run_dir)
    assert found["Entropy"][1] == found["Reward"][1] == "bad"


def test_judgements_need_only_what_is_there() -> None:
    assert judge([{"step": 1}], {}) == []
    assert [v.label for v in judge([{"step": 1, "train/reward": 1.0}], {})] == ["Reward"]
    assert ends([1.0]) == (1.0, 1.0) and ends([float(i) for i in range(20)]) == (0.5, 18.5)


def chart(rows: list[dict[str, Any]], title: str) -> dict[str, Any]:
    (found,) = [panel for panel in make_charts(rows) if panel["title"] == title]
    return found


def test_charts_show_domains_gaps_and_every_metric() -> None:
    rows: list[dict[str, Any]] = [
        {
            "step": 1,
            "train/reward": 0.1,
            "train/reward/math": 0.2,
            "train/kl": None,
            "mine/new": 3.0,
            "time/train_s": 1.0,
        },
        {"step": 2, "train/reward": 0.3, "train/reward/math": 0.4, "train/kl": 0.5, "eval/accuracy": 0.6},
    ]
    lines = {line["name"]: (list(line["x"]), list(line["y"])) for line in chart(rows, "Reward")["series"]}
    assert lines == {
        "reward": ([1, 2], [0.1, 0.3]),
        "reward, math": ([1, 2], [0.2, 0.4]),
        "held-out accuracy": ([2], [0.6]),
    }
    (kl,) = chart(rows, "KL to the reference")["series"]
    assert (list(kl["x"]), list(kl["y"])) == ([1, 2], [None, 0.5])
    assert chart(rows, "mine/new")["series"][0]["y"] == (3.0,)
    assert chart(rows, "Time by stage")["kind"] == "stack"
    shown = {line["key"] for panel in make_charts(rows) for line in panel["series"]}
    assert shown == {key for row in rows for key in row} - {"step"}


def test_page_needs_nothing_else_and_keeps_texts_as_they_are(run_dir: Path) -> None:
    write_run(run_dir)
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert not re.search(r"""<(script|link|img)[^>]+(src|href)=""", page)
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    assert data["samples"][0]["completion"] == NASTY
    assert ["run.steps", "40"] in data["config"]
    assert page.count("drawCharts(data.charts)") == 1 and "Plotly" in page


def test_output_can_go_elsewhere(run_dir: Path, tmp_path: Path) -> None:
    write_run(run_dir)
    assert write_report(run_dir, tmp_path / "page.html") == tmp_path / "page.html"
    assert (tmp_path / "page.html").stat().st_size > 1_000_000


def test_no_metrics_yet_is_an_error(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="wait for the first step"):
        write_report(run_dir)
