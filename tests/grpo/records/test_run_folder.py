"""The run folder: what is in it, and who may begin, continue or delete one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from grpo.config import ConfigError, TrainConfig, load_config
from grpo.records.metrics import MetricsLog, read_metrics, read_rows
from grpo.records.run_folder import SampleLog, begin_run, check_run_dir, delete_run, load_run, rewind, sample_rows
from rewards.types import Answer, ScoredGroup
from rollout.types import FinishReason, Group, Task
from tests.test_config import MINIMAL


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(MINIMAL)
    return path


def configure(run_file: Path, *overrides: str) -> TrainConfig:
    return load_config(run_file, (f"run.output_dir={run_file.parent / 'runs'}", *overrides))


def scored_group(index: int, rewards: list[float], prompt: object = "1+1=") -> ScoredGroup:
    values = np.array(rewards, np.float64)
    answers = tuple(Answer(f"text {i}", i + 1, FinishReason.STOP) for i in range(len(rewards)))
    group = Group(index, Task("t", "math", prompt, "2"), np.array([1], np.int32), ())  # pyright: ignore[reportArgumentType]
    return ScoredGroup(group, answers, values, np.isfinite(values), {"mine": values / 2}, {})


def test_new_run_holds_config_versions_and_seed(run_file: Path) -> None:
    config = configure(run_file, "run.seed=5", "stability.delta=off")
    run_dir = begin_run(config, run_file=run_file, resume=False)
    assert run_dir == config.run_dir
    assert load_run(run_dir) == (config, run_file)
    assert load_run(run_dir, ("run.eval_samples=4",))[0].run.eval_samples == 4
    with pytest.raises(ConfigError, match=r"config\.json: run\.eval_samplse: unknown key; did you mean 'eval_samples'"):
        load_run(run_dir, ("run.eval_samplse=4",))
    record = json.loads((run_dir / "run.json").read_text())
    assert record["seed"] == 5 and len(record["starts"]) == 1
    assert {"python", "torch", "ray", "transformers"} <= set(record["starts"][0]["versions"])


def test_a_run_with_steps_is_not_overwritten(run_file: Path) -> None:
    config = configure(run_file)
    run_dir = begin_run(config, run_file=run_file, resume=False)
    check_run_dir(config, resume=False)  # nothing happened yet: no reason to ask
    MetricsLog(run_dir, tensorboard=False).write(1, {"a": 1.0})
    with pytest.raises(ConfigError, match="already holds a run: continue it with --resume"):
        check_run_dir(config, resume=False)


def test_resume_adds_a_start_and_takes_new_knobs(run_file: Path) -> None:
    begin_run(configure(run_file), run_file=run_file, resume=False)
    longer = configure(run_file, "run.steps=9", "learner.lr=1e-3")
    check_run_dir(longer, resume=True)
    run_dir = begin_run(longer, run_file=run_file, resume=True)
    assert load_run(run_dir)[0] == longer
    assert [start["resumed"] for start in json.loads((run_dir / "run.json").read_text())["starts"]] == [False, True]


def test_resume_refuses_what_would_change_the_stream_of_tasks(run_file: Path) -> None:
    begin_run(configure(run_file), run_file=run_file, resume=False)
    with pytest.raises(ConfigError, match=r"run\.seed is 3 but the run began with 0"):
        check_run_dir(configure(run_file, "run.seed=3"), resume=True)


def test_resume_needs_a_run(run_file: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run: start it without --resume"):
        check_run_dir(configure(run_file), resume=True)


def test_only_run_folders_are_deleted(run_file: Path) -> None:
    config = configure(run_file)
    delete_run(config.run_dir)
    run_dir = begin_run(config, run_file=run_file, resume=False)
    delete_run(run_dir)
    assert not run_dir.exists()
    with pytest.raises(ConfigError, match="not a run folder"):
        delete_run(run_file.parent)
    other = configure(run_file, f"run.output_dir={run_file.parent.parent}", f"run.name={run_file.parent.name}")
    with pytest.raises(ConfigError, match="not a run folder"):
        check_run_dir(other, fresh=True)


def test_rewind_drops_metrics_and_samples_of_later_steps(run_file: Path) -> None:
    run_dir = begin_run(configure(run_file), run_file=run_file, resume=False)
    metrics, samples = MetricsLog(run_dir, tensorboard=False), SampleLog(run_dir, samples_per_step=4)
    for step in (1, 2, 3):
        metrics.write(step, {"a": 1.0})
        samples.write(step, [scored_group(step, [0.0, 1.0])])
    metrics.close()
    samples.close()
    rewind(run_dir, 2)
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2]
    assert [row["step"] for row in read_rows(run_dir / "samples.jsonl")] == [1, 1, 2, 2]


def test_best_and_worst_of_each_group_with_advantage(tmp_path: Path) -> None:
    rows = list(sample_rows(3, [scored_group(7, [0.5, float("nan"), 2.0, 0.0])]))
    assert [(row["sample"], row["reward"]) for row in rows] == [(2, 2.0), (3, 0.0)]
    np.testing.assert_allclose([row["advantage"] for row in rows], [2.0 - 2.5 / 3, -2.5 / 3])
    assert rows[0] == {
        "step": 3,
        "group": 7,
        "sample": 2,
        "domain": "math",
        "prompt": "1+1=",
        "completion": "text 2",
        "answer": "2",
        "reward": 2.0,
        "breakdown": {"mine": 1.0},
        "advantage": rows[0]["advantage"],
        "num_tokens": 3,
        "finish_reason": "stop",
    }


def test_groups_without_two_valid_samples() -> None:
    assert len(list(sample_rows(1, [scored_group(0, [1.0, 1.0])]))) == 2
    assert len(list(sample_rows(1, [scored_group(0, [1.0])]))) == 1
    assert list(sample_rows(1, [scored_group(0, [float("nan")] * 2)])) == []


def test_sample_log_is_bounded_and_shows_chats_as_text(tmp_path: Path) -> None:
    log = SampleLog(tmp_path, samples_per_step=3)
    chat = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"})
    log.write(1, [scored_group(i, [0.0, 1.0], chat) for i in range(4)])
    log.close()
    rows = read_rows(tmp_path / "samples.jsonl")
    assert len(rows) == 3 and rows[0]["prompt"] == "system: be brief\n\nuser: hi"
