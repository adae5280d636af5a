"""A checked configuration in, what the run will do and need out: the table of `keel train --dry-run`.

Memory comes from the model's configuration alone: its parameters are counted on the meta device, no weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from grpo.config import TrainConfig
from grpo.preflight import Preflight, num_experts

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KEPT_IDS_PER_TOKEN = 8
"""Typical mean size of a top-p support; an int32 each, and an int64 row offset."""
DEFAULT_CPU_KV_GIB = 0.25
BYTE_EXPERT_IDS = 256
"""Up to this many experts, an id is one byte in the record, else two."""


@dataclass(frozen=True, slots=True)
class Section:
    """One titled part of the plan."""

    title: str
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What memory depends on."""

    num_parameters: int
    num_layers: int
    num_experts: int
    experts_per_token: int
    kv_bytes_per_token: int
    """Keys and values of all layers, in the engine's dtype, over all of its GPUs."""


def make_plan(config: TrainConfig, preflight: Preflight) -> tuple[Section, ...]:
    """Batches, memory and processes of the run."""
    size = measure_model(config, preflight)
    return (
        _work(config, preflight),
        _batches(config),
        _memory(config, size),
        _records(config, size),
        _processes(config),
    )


def render(plan: Sequence[Section]) -> RenderableType:
    """The plan for a terminal."""
    tables = []
    for section in plan:
        table = Table(title=section.title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(style="dim", min_width=26)
        table.add_column(overflow="fold")
        for row in section.rows:
            table.add_row(*row)
        tables.append(table)
    return Group(*tables)


def measure_model(config: TrainConfig, preflight: Preflight) -> ModelSize:
    """Counts parameters on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preflight.hf_config)
    text: Any = preflight.hf_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    latent = getattr(text, "kv_lora_rank", None)  # multi-head latent attention caches one latent and one rotary key
    kv_width = latent + text.qk_rope_head_dim if latent else 2 * heads * head_dim
    return ModelSize(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=text.num_hidden_layers,
        num_experts=num_experts(preflight.hf_config),
        experts_per_token=int(getattr(text, "num_experts_per_tok", None) or 0),
        kv_bytes_per_token=kv_width * text.num_hidden_layers * BYTES[config.rollout.dtype],
    )


def _work(config: TrainConfig, preflight: Preflight) -> Section:
    domains = sorted({task.domain for task in preflight.tasks})
    epochs = config.run.steps * config.grpo.prompts_per_step / len(preflight.tasks)
    rows = [
        ("run folder", str(config.run_dir)),
        ("model", f"{preflight.model_path} ({'Mixture of Experts' if preflight.is_moe else 'dense'})"),
        (
            "tasks",
            f"{len(preflight.tasks):,} to train on ({epochs:.3g} epochs), {len(preflight.eval_tasks):,} held out",
        ),
    ]
    for domain in domains:
        knobs, sampling = config.stability_of(domain), config.sampling_of(domain)
        rewards = " + ".join(f"{reward.weight:g} {reward.name}" for reward in preflight.rewards[domain])
        delta = "off" if knobs.delta is None else f"{knobs.delta:g}"
        limits = f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, top_k {sampling.top_k or 'off'}"
        objective = f"beta {knobs.beta:g}, delta {delta}, clip -{knobs.eps_low:g} +{knobs.eps_high:g}"
        rows.append((f"domain {domain}", f"{limits}; {objective}; reward {rewards}"))
    return Section("What", tuple(rows))


def _batches(config: TrainConfig) -> Section:
    samples = config.grpo.prompts_per_step * config.grpo.group_size
    tokens = samples * config.longest_sequence
    ahead = config.grpo.max_off_policy_steps
    rows = (
        ("steps", f"{config.run.steps:,}"),
        ("samples per step", f"{config.grpo.prompts_per_step} prompts x {config.grpo.group_size} = {samples:,}"),
        ("tokens per step", f"at most {tokens:,} ({config.longest_sequence:,} per sample)"),
        ("optimizer steps", f"{config.grpo.updates_per_batch} per step, {_total_updates(config):,} in all"),
        ("micro-batches", f"at most {config.learner.max_tokens_per_microbatch:,} packed tokens per forward and rank"),
        ("staleness", "none: generation waits for training" if ahead == 0 else f"at most {ahead} policy versions"),
    )
    return Section("Batches", rows)


def _total_updates(config: TrainConfig) -> int:
    return config.run.steps * config.grpo.updates_per_batch


def _memory(config: TrainConfig, size: ModelSize) -> Section:
    ranks, engines = config.learner.ranks, config.rollout.tensor_parallel_size
    float32 = 4 * size.num_parameters
    reference = f"{_size(float32 / ranks)} per rank" if config.needs_reference else "none (every beta is 0)"
    kv = config.rollout.kv_cache_gib
    share = f"what is left of {config.rollout.gpu_memory_fraction:.0%} of each GPU ({DEFAULT_CPU_KV_GIB} GiB on CPU)"
    rows = (
        ("parameters", f"{size.num_parameters:,}"),
        ("master weights", f"{_size(float32 / ranks)} per rank (float32)"),
        ("gradients", f"{_size(float32 / ranks)} per rank (float32)"),
        ("Adam moments", f"{_size(2 * float32 / ranks)} per rank (float32)"),
        ("reference", reference),
        ("host memory", f"{_size(float32 * (1 + config.needs_reference))} where the first rank reads the model"),
        ("engine weights", f"{_size(size.num_parameters * BYTES[config.rollout.dtype] / engines)} per engine GPU"),
        ("KV cache", f"{share if kv is None else _size(kv * 2**30)}, {size.kv_bytes_per_token:,} B per token"),
    )
    return Section("Memory, without activations", rows)


def _records(config: TrainConfig, size: ModelSize) -> Section:
    """What is recorded for replay, beside 4 + 4 + 4 bytes for id, log-probability and version."""
    id_bytes = 1 if size.num_experts <= BYTE_EXPERT_IDS else 2
    records_routes = size.num_experts > 0 and config.stability.keep_routing
    records_kept = config.truncates and config.stability.keep_sampling_mask
    routes = size.num_layers * size.experts_per_token * id_bytes if records_routes else 0
    kept = 4 * KEPT_IDS_PER_TOKEN + 8 if records_kept else 0
    samples = config.grpo.prompts_per_step * config.grpo.group_size
    total = samples * config.longest_sequence * (routes + kept + 12)
    rows = (
        ("expert routes", f"{routes:,} B per token" if routes else "not recorded"),
        ("kept sets", f"about {kept} B per sampled token" if kept else "not recorded (sampling does not truncate)"),
        ("per step", f"at most {_size(total)}"),
    )
    return Section("Records", rows)


def _processes(config: TrainConfig) -> Section:
    rollout, learner = config.rollout, config.learner
    where = config.cluster.address or "a private Ray on this machine"
    shared = config.cluster.layout == "colocated"
    rows = (
        ("Ray", where),
        (
            "rollout workers",
            f"{rollout.workers} x {rollout.tensor_parallel_size} GPU, or {rollout.cpu_threads} CPU threads",
        ),
        ("learner ranks", f"{learner.ranks} x 1 GPU, or {learner.cpu_threads} CPU threads"),
        ("layout", "colocated: engines and learner take turns" if shared else "disaggregated: each has its own"),
        ("GPUs, where there are any", f"{_num_gpus(config)}"),
    )
    return Section("Processes", rows)


def _num_gpus(config: TrainConfig) -> int:
    engines, ranks = config.rollout.workers * config.rollout.tensor_parallel_size, config.learner.ranks
    return max(engines, ranks) if config.cluster.layout == "colocated" else engines + ranks


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"
