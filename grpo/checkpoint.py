"""Training state on disk, complete or not there at all.

A checkpoint is a folder `checkpoints/step-000040/` with `learner/` (distributed checkpoint: weights and optimizer of
all ranks) and `trainer.json` (data position, version, finished step). It is written under a temporary name and renamed
when the last byte is there, so a run killed at any moment resumes from the last whole one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoTokenizer, PreTrainedModel

from grpo.pipeline import PipelineState

_SHARD_BYTES = 5 << 30
_NAME = re.compile(r"step-(\d{6})$")


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What the driver must remember between two steps."""

    step: int
    """Finished training steps, which is also the policy version."""
    pipeline: PipelineState


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """The final name of the checkpoint after `step` steps."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def partial_dir(run_dir: Path, step: int) -> Path:
    """Where a checkpoint is written until it is whole."""
    return run_dir / "checkpoints" / f".partial-step-{step:06d}"


def complete_checkpoint(run_dir: Path, state: TrainerState, keep: int) -> Path:
    """Adds `trainer.json` to what the learner wrote, renames the folder to its final name, deletes the oldest ones."""
    partial, final = partial_dir(run_dir, state.step), checkpoint_dir(run_dir, state.step)
    (partial / "trainer.json").write_text(json.dumps(asdict(state), indent=1))
    _sync_to_disk(partial)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folder = run_dir / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if _NAME.search(path.name)) if folder.exists() else []


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """The driver's part of a checkpoint."""
    data = json.loads((checkpoint / "trainer.json").read_text())
    pipeline = data["pipeline"]
    return TrainerState(data["step"], PipelineState(pipeline["next_index"], tuple(pipeline["pending"])))


def save_training_state(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, counters: dict[str, int]
) -> None:
    """Writes one rank's share; a collective when the model is sharded."""
    folder.mkdir(parents=True, exist_ok=True)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "counters": counters, "rng": torch.get_rng_state()}
    save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load_training_state(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Reads back what `save_training_state` wrote, into the model and the optimizer; returns the counters.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    if not (folder / ".metadata").exists():
        raise FileNotFoundError(f"{folder} holds no training state")
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {
        "model": model_state,
        "optimizer": optimizer_state,
        "counters": {"policy_version": 0, "num_updates": 0},
        "rng": torch.get_rng_state(),
    }
    load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["counters"]


def export_model(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], module: PreTrainedModel, source: str
) -> None:
    """Writes a Hugging Face model folder from streamed tensors, in shards of at most `_SHARD_BYTES`.

    Configuration and generation defaults are the module's, the tokenizer that of `source`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, torch.Tensor] = {}
    paths: list[Path] = []
    size = total = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if shard and size + num_bytes > _SHARD_BYTES:
            paths.append(_write_shard(folder, len(paths), shard))
            shard, size = {}, 0
        shard[name] = tensor.cpu()
        size, total = size + num_bytes, total + num_bytes
    paths.append(_write_shard(folder, len(paths), shard))
    _name_shards(folder, paths, total)
    module.config.save_pretrained(folder)
    if module.generation_config is not None:
        module.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _write_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> Path:
    path = folder / f"shard-{number:05d}.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def _name_shards(folder: Path, paths: list[Path], total_bytes: int) -> None:
    """Gives the shards their final names, which hold how many there are, and writes the index of several."""
    if len(paths) == 1:
        os.replace(paths[0], folder / "model.safetensors")
        return
    weight_map = {}
    for number, path in enumerate(paths, start=1):
        final = folder / f"model-{number:05d}-of-{len(paths):05d}.safetensors"
        os.replace(path, final)
        with safe_open(final, framework="pt") as shard:
            weight_map |= dict.fromkeys(shard.keys(), final.name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _sync_to_disk(folder: Path) -> None:
    """Asks the system to write a folder's files, so that the rename never names data that is not there."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
