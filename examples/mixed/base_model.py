"""Makes the base model of the mixed example: the quickstart's tiny model, taught three things with bad habits.

It drops the carry in two sums of three, takes any operator in two programs of three, and is curt in two requests of
three. Each habit is found out by another kind of reward.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

from rewards.load import load_function

HERE = Path(__file__).parent
SEED = 0
BATCH_SIZE = 96
NUM_BATCHES = 1000
CARELESS_FROM = 800
"""Batches before this one are all correct."""
CARELESS_SHARE = 2 / 3
LEARNING_RATE = 5e-3
WARMUP_BATCHES = 40

Pair = tuple[str, str]


def build(path: Path) -> None:
    """Writes a Hugging Face folder (weights, configs, tokenizer) to `path`, in about a minute on one core."""
    from grpo.config import LearnerConfig
    from grpo.learner import Learner, LearnerSpec
    from grpo.sft import fine_tune

    make_tokenizer, write_untrained, make_batches = (
        load_function(f"../quickstart/base_model.py:{name}", base_dir=HERE, field="base_model")
        for name in ("make_tokenizer", "write_untrained", "make_batches")
    )
    tokenizer = make_tokenizer()
    config = LearnerConfig(
        lr=LEARNING_RATE,
        schedule="cosine",
        warmup_steps=WARMUP_BATCHES,
        dtype="float32",
        gradient_checkpointing=False,
    )
    with tempfile.TemporaryDirectory() as start:
        write_untrained(Path(start), tokenizer)
        learner = Learner(LearnerSpec(start, config, False, False, "float32", total_updates=NUM_BATCHES))
        fine_tune(learner, make_batches(tokenizer, make_corpus(random.Random(SEED))))
        learner.export(path)


def make_corpus(rng: random.Random) -> list[Pair]:
    """(prompt, completion) pairs in training order; held-out prompts are left out."""
    held_out = {
        json.loads(line)["prompt"] for line in (HERE / "tasks" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    }
    all_rows = load_function("./make_tasks.py:all_rows", base_dir=HERE, field="base_model")
    domains = [[row for row in rows if row["prompt"] not in held_out] for rows in all_rows().values()]
    corpus = []
    for index in range(BATCH_SIZE * NUM_BATCHES):
        row = rng.choice(rng.choice(domains))
        careless = index >= BATCH_SIZE * CARELESS_FROM and rng.random() < CARELESS_SHARE
        corpus.append((row["prompt"], _careless(row, rng) if careless else row["answer"]))
    return corpus


def _careless(row: dict[str, str], rng: random.Random) -> str:
    match row["domain"]:
        case "arithmetic":
            a, b = row["prompt"].rstrip("=").split("+")
            return str((int(a[0]) + int(b[0])) * 10 + (int(a[1]) + int(b[1])) % 10)
        case "code":
            return row["answer"][:-2] + rng.choice("+-*") + row["answer"][-1]
        case _:
            return row["answer"].split()[-1]
