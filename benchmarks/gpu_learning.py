"""A learning run on one GPU, with all stability fixes on and with all of them off, from Keel's own cold start.

    python -m benchmarks.gpu_learning             # base model, all runs side by side, table
    python -m benchmarks.gpu_learning --figure    # the figure, from the runs that are there
    python -m benchmarks.gpu_learning --small     # a few steps of a small model, to see that it all works without a GPU

The task is a sum of four three-digit numbers by running totals, all written with the ones first: `743+285+619+205=`
asks for 347 + 582 + 916 + 502, and `9290,5481,7432` is right. The base model is taught by supervised steps through
Keel's learner, first on right totals, then on totals of which some drop every carry; it then gets a seventh of the
sums right, and reinforcement learning has only the last total to judge by. Each batch is used for four updates.
Runs live in runs/gpu_learning/.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import tomli_w
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.ablation_report import Column, Rows, draw_panels, print_table, values
from benchmarks.machine import describe_machine
from examples.quickstart.base_model import make_tokenizer
from grpo.config import LearnerConfig, load_config
from grpo.learner import Learner, LearnerSpec
from grpo.records.metrics import read_metrics
from grpo.sft import fine_tune

ROOT = Path(__file__).parents[1]
HOME = ROOT / "runs" / "gpu_learning"
FIGURE = ROOT / "docs" / "figures" / "gpu_learning.svg"
NUM_EVAL, NUM_TRAIN = 256, 8192
SEEDS = (0, 1)
OFF = (
    "stability.keep_routing=false",
    "stability.keep_sampling_mask=false",
    "stability.allow_biased_truncation=true",
    "stability.delta=off",
    "stability.unbiased_kl=false",
)
VARIANTS = {"on": ("all fixes on", ()), "off": ("all fixes off", OFF)}
"""Name -> label in figure and table, overrides."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is."""

    numbers: int
    digits: int
    shape: dict[str, int]
    correct_batches: int
    careless_batches: int
    batch: int
    steps: int
    prompts: int


FULL = Scale(
    numbers=4,
    digits=3,
    shape={
        "hidden_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 96,
        "intermediate_size": 384,
    },
    correct_batches=900,
    careless_batches=250,
    batch=384,
    steps=100,
    prompts=64,
)
SMALL = Scale(
    numbers=2,
    digits=2,
    shape=FULL.shape | {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 32, "moe_intermediate_size": 32},
    correct_batches=150,
    careless_batches=30,
    batch=64,
    steps=2,
    prompts=4,
)
CARELESS_SHARE = 0.4
"""How often an addition of the second corpus drops its carries."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", action="store_true", help="run nothing")
    parser.add_argument("--base", action="store_true", help="make only the tasks and the base model")
    parser.add_argument("--small", action="store_true", help="small enough for a CPU")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of the runs")
    parser.add_argument("--run", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scale, home = (SMALL, HOME.with_name("gpu_learning_small")) if arguments.small else (FULL, HOME)
    if arguments.run:
        run_one(scale, home, arguments.run[0], int(arguments.run[1]), arguments.lr)
        return
    if arguments.figure:
        draw_panels(read_runs(home), PANELS, FIGURE, logarithmic=LOGARITHMIC)
        return
    write_tasks(scale, home)
    if not (home / "base").exists():
        build_base(scale, home / "base")
    if not arguments.base:
        run_all(arguments.small, arguments.lr)
        report(home)


# -- the task


def draw_sum(rng: random.Random, scale: Scale, careless_share: float = 0.0) -> tuple[str, str]:
    """A prompt and its running totals, some of them without their carries."""
    numbers = [rng.randrange(10 ** (scale.digits - 1), 10**scale.digits) for _ in range(scale.numbers)]
    total, totals = numbers[0], []
    for number in numbers[1:]:
        total = add_without_carry(total, number) if rng.random() < careless_share else total + number
        totals.append(total)
    width = scale.digits + 1
    return "+".join(ones_first(n, 0) for n in numbers) + "=", ",".join(ones_first(n, width) for n in totals)


def ones_first(number: int, width: int) -> str:
    """347 is written 743, or 7430 in four digits: a carry is then decided by what stands to the left."""
    return f"{number:0{width}d}"[::-1]


def add_without_carry(a: int, b: int) -> int:
    """The careless sum, column by column: 347 + 582 gives 829."""
    columns = zip(f"{a:04d}", f"{b:04d}", strict=True)
    return int("".join(str((int(x) + int(y)) % 10) for x, y in columns))


def write_tasks(scale: Scale, home: Path) -> None:
    """Training and held-out tasks; the answer is the last total."""
    home.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    for name, count in (("train", NUM_TRAIN), ("eval", NUM_EVAL)):
        pairs = [draw_sum(rng, scale) for _ in range(count)]
        rows = [{"prompt": prompt, "answer": totals.split(",")[-1]} for prompt, totals in pairs]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# -- the cold start


def build_base(scale: Scale, folder: Path) -> None:
    """Teaches a random model the task and the careless habit."""
    tokenizer = make_tokenizer()
    total = scale.correct_batches + scale.careless_batches
    config = LearnerConfig(
        lr=1e-3, schedule="cosine", warmup_steps=total // 20, dtype="float32", gradient_checkpointing=False
    )
    with tempfile.TemporaryDirectory() as start:
        write_untrained(scale, Path(start), tokenizer)
        learner = Learner(LearnerSpec(start, config, False, False, "bfloat16", total_updates=total))
        losses = fine_tune(learner, make_batches(scale, tokenizer))
        learner.export(folder)
    marks = [f"{fmean(losses[i : i + 50]):.3f}" for i in range(0, len(losses), 100)]
    print("supervised loss, nats per token, every 100 steps:", *marks, flush=True)


def write_untrained(scale: Scale, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The model with random weights, and its tokenizer."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=len(tokenizer),
        decoder_sparse_step=1,
        norm_topk_prob=True,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **scale.shape,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_batches(scale: Scale, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Token ids of prompts and totals, right ones before careless ones; a completion ends with `<eos>`."""
    rng = random.Random(0)
    for index in range(scale.correct_batches + scale.careless_batches):
        share = CARELESS_SHARE if index >= scale.correct_batches else 0.0
        prompts, totals = zip(*(draw_sum(rng, scale, share) for _ in range(scale.batch)), strict=True)
        prompt_ids: Any = tokenizer(list(prompts)).input_ids
        total_ids: Any = tokenizer([text + str(tokenizer.eos_token) for text in totals]).input_ids
        yield [(np.array(p), np.array(t)) for p, t in zip(prompt_ids, total_ids, strict=True)]


# -- the runs


def run_all(small: bool, lr: float) -> None:
    """Every variant and seed at once, each in a process with a Ray of its own.

    Raises:
        RuntimeError: a run has failed.
    """
    environment = os.environ | {"RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.05", "OMP_NUM_THREADS": "1"}
    running = {}
    for name, seed in [(name, seed) for seed in (SEEDS[:1] if small else SEEDS) for name in VARIANTS]:
        command = [sys.executable, "-m", "benchmarks.gpu_learning", "--lr", str(lr), "--run", name, str(seed)]
        running[f"{name}-{seed}"] = subprocess.Popen([*command, *(["--small"] if small else [])], env=environment)
    failed = [name for name, process in running.items() if process.wait() != 0]
    if failed:
        raise RuntimeError(f"runs that failed: {', '.join(failed)}")


def run_one(scale: Scale, home: Path, variant: str, seed: int, lr: float) -> None:
    """Trains one run from the start."""
    from grpo.train import train

    run_file = home / f"{variant}-{seed}.toml"
    run_file.write_text(tomli_w.dumps(tables(scale, home, f"{variant}-{seed}", seed, lr)))
    config = load_config(run_file, VARIANTS[variant][1])
    train(config, run_file=run_file, fresh=True)


def tables(scale: Scale, home: Path, name: str, seed: int, lr: float) -> dict[str, Any]:
    """The run file with all fixes on."""
    return {
        "run": {
            "name": name,
            "steps": scale.steps,
            "seed": seed,
            "output_dir": str(home),
            "tensorboard": False,
            "eval_every": max(1, scale.steps // 5),
            "eval_samples": 2,
        },
        "model": {"path": "base"},
        "tasks": {"train": "train.jsonl", "eval": "eval.jsonl", "max_prompt_tokens": 24},
        "sampling": {"top_p": 0.95, "max_new_tokens": 24},
        "grpo": {"group_size": 8, "prompts_per_step": scale.prompts, "updates_per_batch": 4},
        "stability": {"beta": 0.005, "max_parity_error": 10.0},
        "learner": {"lr": lr, "warmup_steps": 8, "gradient_checkpointing": False},
        "rollout": {
            "enforce_eager": True,
            "max_concurrent_sequences": 512,
            "gpu_memory_fraction": 0.15,
            "kv_cache_gib": 2.0 if torch.cuda.is_available() else 0.1,
        },
        "cluster": {"layout": "colocated", "reward_workers": 2},
        "rewards": [{"fn": "rewards.exact_match:exact_match", "kwargs": {"extract": "([0-9]+)$"}}],
    }


# -- the report

NAN = float("nan")


def mean(rows: Rows, key: str) -> float:
    """Over the steps that have it."""
    return fmean(values(rows, key) or [NAN])


COLUMNS = (
    Column("held-out accuracy, end", lambda rows: values(rows, "eval/accuracy")[-1], "{:.3f}"),
    Column("reward, mean", lambda rows: mean(rows, "train/reward"), "{:.3f}"),
    Column("mismatch, mean", lambda rows: mean(rows, "mismatch/mean_abs"), "{:.2e}"),
    Column("mismatch, 99 %", lambda rows: mean(rows, "mismatch/p99_abs"), "{:.2e}"),
    Column("mismatch, largest", lambda rows: max(values(rows, "mismatch/max_abs"), default=NAN), "{:.2f}"),
    Column("route agreement", lambda rows: mean(rows, "mismatch/route_agreement"), "{:.4f}"),
    Column("ratio, mean", lambda rows: mean(rows, "train/ratio_mean"), "{:.4f}"),
    Column("ratio, largest", lambda rows: max(values(rows, "train/ratio_max"), default=NAN), "{:.3g}"),
    Column("masked", lambda rows: mean(rows, "train/masked_sequences"), "{:.1%}"),
    Column("gradient norm, largest", lambda rows: max(values(rows, "train/grad_norm"), default=NAN), "{:.3g}"),
    Column("step, s", lambda rows: mean(rows, "time/step_s"), "{:.2f}"),
)
PANELS = {
    "train/reward": "training reward",
    "eval/accuracy": "held-out accuracy",
    "mismatch/mean_abs": "mean abs(log pi_theta - log pi_old) of fresh tokens",
    "mismatch/max_abs": "the largest of them",
    "train/ratio_max": "largest ratio",
    "train/grad_norm": "gradient norm",
    "train/drift": "drift, nats per token",
    "train/kl": "KL to the reference as estimated, nats per token",
}
LOGARITHMIC = frozenset({"mismatch/mean_abs", "mismatch/max_abs", "train/grad_norm", "train/ratio_max"})


def read_runs(home: Path) -> dict[str, list[Rows]]:
    """Metrics of the runs that are there, by label."""
    folders = {label: [home / f"{name}-{seed}" for seed in SEEDS] for name, (label, _) in VARIANTS.items()}
    return {label: [read_metrics(run) for run in found if run.exists()] for label, found in folders.items()}


def report(home: Path) -> None:
    """Prints the table."""
    if torch.cuda.is_available():
        print(f"gpu       {torch.cuda.get_device_name()}")
    print(f"{describe_machine()}\n")
    print_table(read_runs(home), COLUMNS)


if __name__ == "__main__":
    main()
