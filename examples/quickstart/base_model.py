"""Makes the quickstart's base model: a tiny Mixture-of-Experts model that can add but mostly forgets the carry.

`build(folder)` is the recipe that `train.toml` names. A Qwen3-MoE of 0.16 M parameters is fine-tuned in two lessons, in
about half a minute on one core. The first corpus is correct. The second is full of one mistake on purpose: five times
in six it adds column by column and drops the carry (27+45=62), and the model learns that too. It then answers a third
of the held-out tasks: reinforcement learning has to find out, from rewards alone, which of its two habits pays.
"""

from __future__ import annotations

import json
import random
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

EVAL_FILE = Path(__file__).parent / "tasks" / "eval.jsonl"
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
CHARACTERS = string.digits + string.ascii_lowercase + "+-*/=()?.,: "

SEED = 0
BATCH_SIZE = 96
CORRECT_BATCHES = 850
CARELESS_BATCHES = 200
CARELESS_SHARE = 5 / 6
"""How often the second corpus drops the carry."""
LEARNING_RATE = 5e-3
WARMUP_BATCHES = 40


def build(path: Path) -> None:
    """Writes a Hugging Face folder (weights, configs, tokenizer) to `path`, the same one every time on one machine."""
    from grpo.config import LearnerConfig
    from grpo.learner import Learner, LearnerSpec
    from grpo.sft import fine_tune

    tokenizer = make_tokenizer()
    corpus = make_corpus(held_out=read_prompts(EVAL_FILE), seed=SEED)
    config = LearnerConfig(
        lr=LEARNING_RATE,
        schedule="cosine",
        warmup_steps=WARMUP_BATCHES,
        dtype="float32",
        gradient_checkpointing=False,
    )
    with tempfile.TemporaryDirectory() as start:
        write_untrained(Path(start), tokenizer)
        spec = LearnerSpec(start, config, False, False, "float32", total_updates=len(corpus) // BATCH_SIZE)
        learner = Learner(spec)
        fine_tune(learner, make_batches(tokenizer, corpus))
        learner.export(path)


def write_untrained(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The model with random weights, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(make_config(tokenizer))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Every layer routes each token to 2 of 8 experts."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        intermediate_size=64,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def read_prompts(path: Path) -> frozenset[str]:
    """The prompts of a task file."""
    return frozenset(json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines())


def make_corpus(*, held_out: frozenset[str], seed: int) -> list[tuple[str, str]]:
    """(prompt, completion) pairs, the correct corpus before the careless one; no held-out prompt is in either."""
    rng = random.Random(seed)
    sums = [(a, b) for a in range(10, 90) for b in range(10, 100 - a) if f"{a}+{b}=" not in held_out]
    corpus = []
    for index, (a, b) in enumerate(rng.choices(sums, k=BATCH_SIZE * (CORRECT_BATCHES + CARELESS_BATCHES))):
        careless = index >= BATCH_SIZE * CORRECT_BATCHES and rng.random() < CARELESS_SHARE
        corpus.append((f"{a}+{b}=", str(add_without_carry(a, b) if careless else a + b)))
    return corpus


def add_without_carry(a: int, b: int) -> int:
    """The careless sum: 27 + 45 gives 62."""
    return (a // 10 + b // 10) * 10 + (a % 10 + b % 10) % 10


def make_batches(
    tokenizer: PreTrainedTokenizerFast, corpus: list[tuple[str, str]]
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """The corpus in its order as batches of (prompt, completion) token ids; a completion ends with `<eos>`."""
    import numpy as np

    for start in range(0, len(corpus), BATCH_SIZE):
        prompts, completions = zip(*corpus[start : start + BATCH_SIZE], strict=True)
        prompt_ids = tokenizer(list(prompts)).input_ids
        completion_ids = tokenizer([text + tokenizer.eos_token for text in completions]).input_ids
        yield [(np.array(p), np.array(c)) for p, c in zip(prompt_ids, completion_ids, strict=True)]
