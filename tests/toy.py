"""A complete run on disk: random tiny MoE, character tokenizer, tasks, a reward that wants digits, and a run file."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import tomli_w
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import VOCAB_SIZE, make_qwen3_moe


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with one id per printable character."""
    characters = ["<pad>", "<eos>", "<bos>", *(c for c in string.printable if c.isprintable()), "\n"]
    assert len(characters) == VOCAB_SIZE
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    fast.save_pretrained(folder)


def write_model(folder: Path) -> Path:
    """A random tiny Qwen3-MoE with that tokenizer."""
    make_qwen3_moe(folder)
    write_tokenizer(folder)
    return folder


def write_run(folder: Path, model: Path, **tables: dict[str, Any]) -> Path:
    """A run file in `folder` with its tasks and reward; `tables` are merged over the defaults."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "domain": "sums"} for a in range(10) for b in range(10)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(
        "def digits(task, answer):\n    return sum(c.isdigit() for c in answer.text) / answer.num_tokens\n"
    )
    config: dict[str, Any] = {
        "run": {"name": "toy", "steps": 3, "output_dir": str(folder / "runs"), "tensorboard": False},
        "model": {"path": str(model)},
        "tasks": {"train": "tasks.jsonl", "max_prompt_tokens": 8},
        "sampling": {"top_p": 0.9, "max_new_tokens": 16},
        "grpo": {"group_size": 4, "prompts_per_step": 6, "updates_per_batch": 2},
        "stability": {"beta": 0.01},
        "learner": {"lr": 1e-3, "dtype": "float32", "gradient_checkpointing": False},
        "rollout": {"dtype": "float32", "max_concurrent_sequences": 32},
        "debug": {"samples_per_step": 1000},
        "rewards": [{"fn": "./reward.py:digits"}],
    }
    for table, values in tables.items():
        config[table] = {**config.get(table, {}), **values}
    path = folder / "train.toml"
    path.write_text(tomli_w.dumps(config))
    return path
