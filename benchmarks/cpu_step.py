"""One training step of the quickstart on a CPU, stage by stage, and what recording and kept sets cost and save there.

    python -m benchmarks.cpu_step 2> /dev/null

Four tables: the step through Ray, as `keel train` runs it; the learner's part of it in one process; engine tokens/s
with both recordings against none; log-probabilities over kept sets against the full vocabulary. Every compute process
has one thread, as in the quickstart.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import describe_machine
from benchmarks.memory import Stage, measured, peak_of_children

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.batch import TrainBatch
    from grpo.learner import Learner
    from rollout.engine import Engine

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart" / "train.toml"
STEPS = 12
WARM_UP_STEPS = 2
LEARNER_STEP = 3
"""Early in the run, while most groups still carry a signal."""
LEARNER_REPEATS = 20
ENGINE_REPEATS = 9
ENGINE_PROMPTS, ENGINE_SAMPLES, ENGINE_TOKENS = 32, 8, 48
VOCAB_SIZE, WIDTH = 151_936, 1024
KEPT_REPEATS = 5
DENSE_REPEATS = {1024: 3, 4096: 1}
"""Sampled tokens -> how often the slow side is measured."""
MIB = 2**20


def main() -> None:
    """Measures everything and prints the tables."""
    os.environ["OMP_NUM_THREADS"] = "1"
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = print_step(Path(folder))
        in_child(print_learner, run_dir / "batches" / f"step-{LEARNER_STEP:06d}")
    print_recording()
    in_child(print_kept)


def in_child(function: Callable[..., None], *arguments: Any) -> None:
    """Runs one measurement in a process of its own, so that no other one's memory or threads are in it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(function, *arguments).result()


def heading(title: str, *columns: str) -> None:
    """A Markdown table's head."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


# -- the step through Ray ------------------------------------------------------------------------------------------


def print_step(folder: Path) -> Path:
    """Trains the quickstart for a few steps, every batch dumped; returns the run folder."""
    from grpo.config import load_config
    from grpo.records.metrics import read_metrics
    from grpo.train import train

    overrides = (f"run.steps={STEPS}", "run.eval_every=0", "run.checkpoint_every=0", f"run.output_dir={folder}")
    plain = load_config(QUICKSTART, (*overrides, "run.name=plain"))
    with peak_of_children("RolloutActor", "LearnerActor") as peaks, redirect_stdout(sys.stderr):
        train(plain, run_file=QUICKSTART)
    rows = read_metrics(plain.run_dir)[1 + WARM_UP_STEPS :]
    heading("One step through Ray", "stage", "median ms", "share")
    step = statistics.median(r["time/step_s"] for r in rows)
    for stage in ("generate", "score", "train", "sync", "probe"):
        seconds = statistics.median(r[f"time/{stage}_s"] for r in rows)
        row(stage, f"{seconds * 1e3:.1f}", f"{seconds / step:.0%}")
    row("whole step", f"{step * 1e3:.1f}", "100%")
    tokens, samples = (statistics.median(r[key] for r in rows) for key in ("rollout/tokens", "train/num_samples"))
    print(f"\n{tokens:.0f} tokens drawn and {samples:.0f} samples trained on per step (medians of {len(rows)} steps).")
    named = ", ".join(f"{name} {peak / MIB:.0f} MiB" for name, peak in peaks.items())
    print(f"Highest resident memory: {named}.")
    dumped = load_config(QUICKSTART, (*overrides, "run.name=dumped", "debug.dump_batches=true"))
    dumped = dumped.model_copy(update={"run": dumped.run.model_copy(update={"steps": LEARNER_STEP})})
    with redirect_stdout(sys.stderr):
        train(dumped, run_file=QUICKSTART)
    return dumped.run_dir


# -- the learner's part --------------------------------------------------------------------------------------------


def print_learner(step: Path) -> None:
    """The first update of a recorded step, taken apart."""
    learner, batches = load_step(step)
    stages: dict[str, list[Stage]] = {}
    for _ in range(LEARNER_REPEATS):
        for name, stage in take_update_apart(learner, batches).items():
            stages.setdefault(name, []).append(stage)
    tokens = sum(len(batch.token_ids) for batch in batches)
    heading(f"The learner's part of one update ({tokens} packed tokens), in one process", "stage", "median ms", "MiB")
    for name, repeats in stages.items():
        seconds = statistics.median(stage.seconds for stage in repeats)
        row(name, f"{seconds * 1e3:.1f}", f"{max(stage.peak_bytes for stage in repeats) / MIB:.1f}")
    print("\nMiB: highest resident memory above that at the stage's start, largest of the repeats.")


def load_step(step: Path) -> tuple[Learner, list[TrainBatch]]:
    """The learner as it was before the step, and the micro-batches of its first update."""
    import torch

    from grpo.batch import TrainBatch
    from grpo.config import LearnerConfig
    from grpo.learner import Learner, LearnerSpec

    torch.set_num_threads(1)
    spec = json.loads((step / "learner.json").read_text())["spec"]
    config = LearnerConfig(**spec.pop("config"))
    learner = Learner(LearnerSpec(**{**spec, "domains": tuple(spec["domains"])}, config=config))
    learner.load(step / "learner")
    updates = torch.load(step / "rank-0.pt", weights_only=True)
    return learner, [TrainBatch(**batch) for batch in updates[0]]


def take_update_apart(learner: Learner, batches: Sequence[TrainBatch]) -> dict[str, Stage]:
    """One optimizer step as `Learner.train` does it, each stage measured; times add up over micro-batches."""
    import torch

    from grpo.logprobs import token_logprobs
    from grpo.loss import LossInputs, grpo_loss

    names = ("policy log-probs", "reference log-probs", "loss", "backward")
    total = {name: Stage() for name in names}
    learner.optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        with measured() as policy:
            scored = token_logprobs(learner.policy, batch)
        with measured() as reference, torch.no_grad():
            anchor = None if learner.reference is None else token_logprobs(learner.reference, batch).logprobs
        with measured() as objective:
            output = grpo_loss(LossInputs(scored.logprobs, anchor, scored.entropy, batch))
        with measured() as backward:
            output.loss.backward()
        for name, stage in zip(names, (policy, reference, objective, backward), strict=True):
            total[name].seconds += stage.seconds
            total[name].peak_bytes = max(total[name].peak_bytes, stage.peak_bytes)
    with measured() as total["clip and optimizer"]:
        learner.apply_gradients()
    with measured() as total["packing the weights for a sync"]:
        for _ in learner.weight_buckets(256 * MIB):
            pass
    return total


# -- recording -----------------------------------------------------------------------------------------------------

_engine: Engine


def print_recording() -> None:
    """Engine tokens/s with both recordings against none: the same requests, one process each, repeats in turn."""
    modes = {"both recordings": True, "none": False}
    pools = {name: ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for name in modes}
    speeds: dict[str, list[float]] = {name: [] for name in modes}
    for name, pool in pools.items():
        pool.submit(start_engine, modes[name]).result()
    drawn = {name: pool.submit(draw).result()[1] for name, pool in pools.items()}  # warm-up
    assert len(set(drawn.values())) == 1, "recording changed what was drawn"
    for _ in range(ENGINE_REPEATS):
        for name, pool in pools.items():
            speeds[name].append(pool.submit(draw).result()[0])
    for pool in pools.values():
        pool.submit(stop_engine).result()
        pool.shutdown()
    heading("Engine tokens/s (one engine per process, same requests)", "recording", "median", "range", "ratio")
    base = statistics.median(speeds["none"])
    for name, values in speeds.items():
        middle = statistics.median(values)
        row(name, f"{middle:.0f}", f"{min(values):.0f} to {max(values):.0f}", f"{middle / base:.3f}")
    paired = [on / off for on, off in zip(*speeds.values(), strict=True)]
    print(f"\nMedian of the {ENGINE_REPEATS} paired ratios: {statistics.median(paired):.3f}.")


def start_engine(record: bool) -> None:
    """Builds this process's engine over the quickstart's base model."""
    global _engine
    from grpo.config import load_config
    from grpo.preflight import ensure_model
    from rollout.engine import Engine

    config = load_config(QUICKSTART)
    path = ensure_model(config, QUICKSTART)
    _engine = Engine(path, config.rollout, max_model_len=64, record_kept=record, record_routing=record)


def draw() -> tuple[float, int]:
    """Tokens/s over the benchmark's requests, and a checksum of what was drawn; the prefix cache stays warm."""
    import asyncio
    import time
    import zlib

    import numpy as np

    from rollout.types import Completion, GenerateRequest

    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 14, 6).astype(np.int32) for _ in range(ENGINE_PROMPTS)]
    requests = [
        GenerateRequest(prompt, tuple(range(i, i + ENGINE_SAMPLES)), 1.0, 0.95, 0, ENGINE_TOKENS, ())
        for i, prompt in enumerate(prompts)
    ]

    async def run() -> list[tuple[Completion, ...]]:
        return await asyncio.gather(*(_engine.generate(request) for request in requests))

    started = time.perf_counter()
    completions = [c for group in asyncio.run(run()) for c in group]
    seconds = time.perf_counter() - started
    checksum = zlib.crc32(np.concatenate([c.token_ids for c in completions]).tobytes())
    return sum(c.num_tokens for c in completions) / seconds, checksum


def stop_engine() -> None:
    _engine.shutdown()


# -- kept sets -----------------------------------------------------------------------------------------------------


def print_kept() -> None:
    """Forward and backward of `support_logprobs` with sets of 8 ids on average, and with none."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(VOCAB_SIZE, WIDTH).mul_(0.02).requires_grad_()
    title = f"Log-probabilities, forward + backward, V = {VOCAB_SIZE}, d = {WIDTH}, float32"
    heading(title, "sampled tokens", "mean set", "kept sets, s", "full vocabulary in chunks, s", "ratio", "MiB")
    for num_rows, dense_repeats in DENSE_REPEATS.items():
        hidden = torch.randn(num_rows, WIDTH, requires_grad=True)
        supports = make_supports(num_rows)
        kept = [run_logprobs(hidden, weight, supports) for _ in range(KEPT_REPEATS)]
        dense = [run_logprobs(hidden, weight, without_sets(supports)) for _ in range(dense_repeats)]
        slow, fast = (statistics.median(stage.seconds for stage in stages) for stages in (dense, kept))
        memory = " against ".join(f"{max(s.peak_bytes for s in stages) / MIB:.0f}" for stages in (kept, dense))
        mean_set = len(supports[1]) / num_rows
        row(str(num_rows), f"{mean_set:.1f}", f"{fast:.3f}", f"{slow:.2f}", f"{slow / fast:.0f}", memory)
    print(f"\nMiB: peak above model and inputs; the head's gradient alone is {weight.numel() * 4 / MIB:.0f}.")


def make_supports(num_rows: int) -> tuple[Tensor, ...]:
    """Offsets, ids, untruncated, targets, temperature; sizes as top-p makes them: mean 8, half of them 2 or less."""
    import torch

    sizes = (0.75 + 1.65 * torch.randn(num_rows)).exp().round().clamp(1, 1000).long()
    sets = [torch.randint(VOCAB_SIZE, (int(size),)).unique() for size in sizes]
    offsets = torch.tensor([0, *(len(ids) for ids in sets)]).cumsum(0)
    targets = torch.stack([ids[torch.randint(len(ids), ())] for ids in sets])
    return offsets, torch.cat(sets), torch.zeros(num_rows, dtype=torch.bool), targets, torch.ones(num_rows)


def without_sets(supports: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same targets over the full vocabulary."""
    import torch

    offsets, ids, untruncated, targets, temperature = supports
    return torch.zeros_like(offsets), ids[:0], torch.ones_like(untruncated), targets, temperature


def run_logprobs(hidden: Tensor, weight: Tensor, supports: tuple[Tensor, ...]) -> Stage:
    from stability.keep_sampling_mask import support_logprobs

    hidden.grad = weight.grad = None
    with measured() as stage:
        logprobs, _ = support_logprobs(hidden, weight, *supports)
        logprobs.sum().backward()
    return stage


if __name__ == "__main__":
    main()
