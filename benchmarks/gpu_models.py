"""Random models of real widths, with a tokenizer and tasks, for benchmarks on a machine that can download nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

VOCAB_SIZE = 151_936
EOS = VOCAB_SIZE - 1

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rope_theta": 1_000_000.0,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    # Qwen3-0.6B
    "dense-0.6b": (
        "qwen3",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    # 1.1 B parameters in 8 layers of 64 experts, 8 of them active
    "moe-1.1b": (
        "qwen3_moe",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "moe_intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "tie_word_embeddings": False,
        },
    ),
    # Qwen3-30B-A3B's widths in 6 of its 48 layers: 3.74 B parameters, 340 M of them active
    "moe-30b-6l": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "tie_word_embeddings": False,
        },
    ),
}
"""Name -> (transformers model type, configuration)."""


def model_config(name: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a shape; `changes` replace its fields."""
    kind, shape = SHAPES[name]
    return AutoConfig.for_model(kind, **(_COMMON | shape | changes))


def make_model(name: str, folder: Path, *, head_scale: float = 8.0) -> Path:
    """Writes the random model in bfloat16; the output layer is scaled up, so that nucleus sampling keeps few ids."""
    torch.manual_seed(0)
    config = model_config(name)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(head_scale)
    model.save_pretrained(folder)
    vocabulary = {"<pad>": 0, **{_word(i): i for i in range(1, EOS)}, "<eos>": EOS}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return folder


def write_tasks(path: Path, *, num_tasks: int, prompt_tokens: int) -> None:
    """Random prompts of one length."""
    rng = random.Random(0)
    prompts = (" ".join(_word(rng.randrange(1, EOS)) for _ in range(prompt_tokens)) for _ in range(num_tasks))
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": ""}) + "\n" for prompt in prompts))


def _word(token_id: int) -> str:
    return f"t{token_id}"
