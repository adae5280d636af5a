"""Every run file in `examples/` loads strictly, and what it names is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.config import load_config
from grpo.preflight import domain_weights
from rewards.load import load_function, load_rewards
from rollout.tasks import TaskStream, load_tasks

EXAMPLES = Path(__file__).parent.parent / "examples"
RUN_FILES = sorted(EXAMPLES.rglob("*.toml"))


def test_there_is_a_quickstart() -> None:
    assert EXAMPLES / "quickstart" / "train.toml" in RUN_FILES


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_run_file_loads_with_its_rewards(path: Path) -> None:
    config = load_config(path)
    rewards = load_rewards(config.rewards, base_dir=path.parent)
    assert len(rewards) == len(config.rewards)
    if config.model.recipe is not None:
        assert callable(load_function(config.model.recipe, base_dir=path.parent, field="model.recipe"))


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_task_files_load(path: Path) -> None:
    config = load_config(path)
    for source in (config.tasks.train, config.tasks.eval):
        if source is not None and source.endswith(".jsonl"):
            tasks = load_tasks(source, config.tasks, base_dir=path.parent)
            stream = TaskStream(tasks, seed=0, shuffle=True, domain_weights=domain_weights(config))
            assert stream.task(0) in tasks
