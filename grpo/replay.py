"""A step's batches on disk, and back through the learner offline.

With `debug.dump_batches` every step leaves `batches/step-000012/`: the training state before the step, each rank's
packed batches (tokens, supports, routes, log-probabilities, weights of the loss) and what the step computed. `keel
replay` loads them in one process and trains the step again. With one rank on CPU every loss and gradient norm must come
out bit for bit; with several ranks it sums their batches itself, so they agree to float32 rounding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from grpo.batch import TrainBatch
from grpo.config import ConfigError, LearnerConfig
from grpo.learner import Learner, LearnerSpec, StepResult

_ROUNDING = 1e-5
"""Relative difference that the order of summation explains when several ranks' batches are replayed in one process."""


def dump_step(learner: Learner, updates: Sequence[Sequence[TrainBatch]], folder: Path) -> StepResult:
    """Writes the state before the step, trains it, and writes the batches and results beside it."""
    learner.save(folder / "learner")
    result = learner.train(updates)
    torch.save([[batch.to_dict() for batch in update] for update in updates], folder / f"rank-{learner.rank}.pt")
    record = {"losses": result.losses, "grad_norms": result.grad_norms, "num_threads": torch.get_num_threads()}
    (folder / f"rank-{learner.rank}.json").write_text(json.dumps(record))
    if learner.rank == 0:
        (folder / "learner.json").write_text(
            json.dumps({"spec": _spec_record(learner.spec), "world_size": learner.world_size}, indent=1)
        )
    return result


def replay_file(path: Path) -> dict[str, object]:
    """Trains a recorded step again and compares.

    Args:
        path: a folder `batches/step-...`, or any file in it.

    Raises:
        ConfigError: there is no recorded step there.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / "learner.json").exists():
        raise ConfigError(
            f"{path}: no recorded step; a run with -o debug.dump_batches=true writes runs/NAME/batches/step-..."
        )
    about = json.loads((folder / "learner.json").read_text())
    records = [json.loads((folder / f"rank-{i}.json").read_text()) for i in range(about["world_size"])]
    torch.set_num_threads(records[0]["num_threads"])
    learner = Learner(_read_spec(about["spec"]))
    learner.load(folder / "learner")
    result = learner.train(_read_updates(folder, about["world_size"]))
    recorded = {
        "loss": [sum(parts) for parts in zip(*(r["losses"] for r in records), strict=True)],
        "grad_norm": records[0]["grad_norms"],
    }
    replayed = {"loss": list(result.losses), "grad_norm": list(result.grad_norms)}
    return {"step": folder.name, "ranks": about["world_size"], **_compare(recorded, replayed)}


def _spec_record(spec: LearnerSpec) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in fields(spec)} | {"config": spec.config.model_dump()}


def _read_spec(data: dict[str, Any]) -> LearnerSpec:
    return replace(LearnerSpec(**data), config=LearnerConfig(**data["config"]), domains=tuple(data["domains"]))


def _read_updates(folder: Path, world_size: int) -> list[list[TrainBatch]]:
    """The batches of all ranks, update by update."""
    ranks = [torch.load(folder / f"rank-{i}.pt", weights_only=True) for i in range(world_size)]
    return [[TrainBatch(**batch) for part in parts for batch in part] for parts in zip(*ranks, strict=True)]


def _compare(recorded: dict[str, list[float]], replayed: dict[str, list[float]]) -> dict[str, object]:
    result: dict[str, object] = {}
    identical, worst = recorded == replayed, 0.0
    for name in recorded:
        for update, (before, after) in enumerate(zip(recorded[name], replayed[name], strict=True)):
            worst = max(worst, abs(before - after) / max(abs(before), 1e-12))
            result[f"{name}[{update}]"] = f"recorded {before!r}, replayed {after!r}"
    verdict = "bit-identical" if identical else "equal to rounding" if worst < _ROUNDING else "DIFFERENT"
    return {**result, "largest relative difference": worst, "verdict": verdict}
