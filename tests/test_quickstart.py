"""The quickstart itself, shortened: the base model answers few tasks, and reinforcement learning lifts it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from grpo.commands.report import write_report
from grpo.config import load_config
from grpo.records.metrics import read_metrics
from grpo.train import train

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"


@pytest.fixture(scope="module")
def base_model(request, tmp_path_factory) -> Path:
    """The quickstart's own recipe, run in this process: the whole of it, or about half of its batches."""
    specification = importlib.util.spec_from_file_location("base_model", QUICKSTART / "base_model.py")
    assert specification is not None and specification.loader is not None
    recipe = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(recipe)
    if request.param == "half":
        vars(recipe).update(CORRECT_BATCHES=500, CARELESS_BATCHES=120)
    path = tmp_path_factory.mktemp("quickstart") / "base"
    recipe.build(path)
    return path


@pytest.mark.parametrize(
    ("base_model", "ahead", "steps", "reached"),
    [
        pytest.param("half", 0, 12, 0.75, id="synchronous"),
        pytest.param("whole", 2, 16, 0.7, id="two ahead", marks=pytest.mark.slow),
    ],
    indirect=["base_model"],
)
def test_the_reward_rises(base_model, ahead, steps, reached, ray_address, tmp_path):
    overrides = {
        "run.steps": steps,
        "run.eval_every": steps,
        "run.checkpoint_every": 0,
        "run.output_dir": f'"{tmp_path}"',
        "model.path": f'"{base_model}"',
        "grpo.max_off_policy_steps": ahead,
        "cluster.address": f'"{ray_address}"',
    }
    run_file = QUICKSTART / "train.toml"
    config = load_config(run_file, tuple(f"{key}={value}" for key, value in overrides.items()))
    run_dir = train(config, run_file=run_file)
    rows = read_metrics(run_dir)
    assert rows[0]["eval/accuracy"] < 0.4 and rows[-1]["eval/accuracy"] > reached
    rewards = [row["train/reward"] for row in rows[1:]]
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 4 * 0.2
    assert max(row["train/staleness_max"] or 0 for row in rows[1:]) == ahead
    assert all(row["mismatch/mean_abs"] < 1e-4 for row in rows[1:] if row["mismatch/mean_abs"] is not None)
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "quickstart" in page and "http://" not in page.split("<body", 1)[0], "the page must stand alone"
