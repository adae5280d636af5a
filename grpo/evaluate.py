"""Held-out accuracy: of a running step, or of a checkpoint from the command line."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grpo.assembly import make_cluster
from grpo.config import ConfigError, TrainConfig
from grpo.judge import owned_judges
from grpo.preflight import Preflight, check, with_endpoints
from grpo.sampling import DrawnGroup, GroupSampler
from rollout.types import Task

_EVAL_SEED_OFFSET = 1 << 32
"""Keeps evaluation seeds apart from training seeds of the same run."""


async def evaluate(sampler: GroupSampler, tasks: Sequence[Task], *, num_samples: int, seed: int) -> dict[str, float]:
    """Draws every held-out task and counts the right answers.

    An answer is right when the first reward of its domain gives it 1 or more. With one sample per task decoding is
    greedy; with k samples the run's own sampling is used and `eval/pass_at_k` is the share of tasks with a right answer
    among k.
    """
    draws = [
        sampler.draw(index, task, num_samples=num_samples, seed=seed + _EVAL_SEED_OFFSET, greedy=num_samples == 1)
        for index, task in enumerate(tasks)
    ]
    groups = await asyncio.gather(*draws)
    metrics = _summarise(groups)
    domains = sorted({task.domain for task in tasks})
    if len(domains) > 1:
        for domain in domains:
            part = _summarise([group for group in groups if group.scored.group.task.domain == domain])
            metrics |= {f"{name}/{domain}": value for name, value in part.items()}
    return metrics


def _summarise(groups: Sequence[DrawnGroup]) -> dict[str, float]:
    right = [_is_right(group) for group in groups]
    judged = [row for row in right if len(row)]
    rewards = np.concatenate([group.scored.rewards[group.scored.valid] for group in groups])
    lengths = [answer.num_tokens for group in groups for answer in group.scored.answers]
    metrics = {
        "eval/accuracy": float(np.mean([row.mean() for row in judged])) if judged else math.nan,
        "eval/reward": float(rewards.mean()) if len(rewards) else math.nan,
        "eval/response_length": float(np.mean(lengths)),
    }
    if len(right[0]) > 1 or len(groups[0].scored.answers) > 1:
        metrics["eval/pass_at_k"] = float(np.mean([row.any() for row in judged])) if judged else math.nan
    return metrics


def _is_right(group: DrawnGroup) -> np.ndarray:  # bool [valid samples]
    outcome = next(iter(group.scored.breakdown.values()))
    return outcome[group.scored.valid] >= 1.0


def evaluate_run(config: TrainConfig, *, run_file: Path, checkpoint: Path | None) -> dict[str, object]:
    """Evaluates the base model, or a checkpoint of the run, on `tasks.eval`.

    Raises:
        ConfigError: the run has no held-out tasks, or something it needs cannot be loaded.
    """
    return asyncio.run(_evaluate_run(config, run_file, checkpoint))


async def _evaluate_run(config: TrainConfig, run_file: Path, checkpoint: Path | None) -> dict[str, object]:
    if config.tasks.eval is None:
        raise ConfigError("tasks.eval: there are no held-out tasks to evaluate on; name a task file there")
    preflight = check(config, run_file)
    with owned_judges(config) as served:
        return await _evaluate_checkpoint(served, with_endpoints(preflight, served, run_file), checkpoint)


async def _evaluate_checkpoint(config: TrainConfig, preflight: Preflight, checkpoint: Path | None) -> dict[str, object]:
    cluster = make_cluster(config, preflight)
    try:
        await cluster.start()
        if checkpoint is not None:
            await cluster.load(checkpoint / "learner")
        await cluster.sync_weights()
        sampler = GroupSampler(config, preflight, cluster)
        metrics = await evaluate(
            sampler, preflight.eval_tasks, num_samples=config.run.eval_samples, seed=config.run.seed
        )
    finally:
        cluster.shutdown()
    return {"checkpoint": str(checkpoint or "base model"), "tasks": len(preflight.eval_tasks), **metrics}
