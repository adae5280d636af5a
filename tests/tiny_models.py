"""Tiny random models on disk: real configurations of real architectures, small enough for a test on a CPU.

Their logits are spread out, so that truncation keeps a few ids and routers choose with a margin.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 99
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def make_qwen3_moe(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Qwen3-MoE: 3 layers, 8 experts, top-2, softmax router. Returns the folder."""
    config = Qwen3MoeConfig(
        **_SHAPE,
        moe_intermediate_size=64,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        norm_topk_prob=True,
    )
    return _save(Qwen3MoeForCausalLM, config, folder, seed, dtype)


def make_qwen3(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Dense Qwen3: 3 layers, heads of 128. Returns the folder."""
    config = Qwen3Config(**_SHAPE, num_key_value_heads=2)
    return _save(Qwen3ForCausalLM, config, folder, seed, dtype)


def make_deepseek_v3(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """DeepSeek-V3: first layer dense, then 16 experts, top-4 out of 2 of 4 groups, sigmoid router with a bias."""
    config = DeepseekV3Config(
        **_SHAPE,
        moe_intermediate_size=64,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=16,
        routed_scaling_factor=2.5,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        rope_interleave=True,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    )
    _save(DeepseekV3ForCausalLM, config, folder, seed, dtype)
    # transformers implies these two; vLLM reads them from the file.
    path = folder / "config.json"
    entries = json.loads(path.read_text()) | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    path.write_text(json.dumps(entries, indent=2))
    return folder


def perturb(model: PreTrainedModel, *, seed: int, scale: float = 0.5) -> None:
    """Adds noise of `scale` times each parameter's own spread: as different from the old weights as training gets."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((noise * parameter.float().std().clamp(min=0.02) * scale).to(parameter.dtype))


def _save(
    architecture: type[PreTrainedModel],
    config: Qwen3MoeConfig | Qwen3Config | DeepseekV3Config,
    folder: Path,
    seed: int,
    dtype: torch.dtype,
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    model: Any = architecture(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
            elif tensor.dim() > 1:
                spread = 0.1 if "gate.weight" in name or "lm_head" in name else 0.05
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
    model.to(dtype).save_pretrained(folder)
    return folder
