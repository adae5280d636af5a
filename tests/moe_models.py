"""Nine tiny Mixture-of-Experts models (and a dense one) with random weights, one per router and attention kind that
Keel meets.

All have 3 layers, width 64 and, where they are sparse, 16 experts of which 4 are chosen; routers are spread so that
tokens differ.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 98
NUM_LAYERS = 3
NUM_SLOTS = 4
NUM_EXPERTS = 16

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_GQA: dict[str, Any] = {"num_key_value_heads": 2}
_CHOOSE: dict[str, Any] = {"num_experts_per_tok": NUM_SLOTS}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_DEEPSEEK: dict[str, Any] = _CHOOSE | {
    "moe_intermediate_size": 32,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
_INDEXER: dict[str, Any] = {"index_topk": 8, "index_head_dim": 32, "index_n_heads": 8}  # fewer heads tie at score 0

_EXTRA: dict[str, dict[str, Any]] = {
    "qwen3_moe": _GQA
    | _CHOOSE
    | {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": NUM_EXPERTS, "norm_topk_prob": True},
    "qwen2_moe": _GQA
    | _CHOOSE
    | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": NUM_EXPERTS},
    "mixtral": _GQA | _CHOOSE | {"num_local_experts": NUM_EXPERTS},
    "olmoe": _GQA | _CHOOSE | {"num_experts": NUM_EXPERTS, "norm_topk_prob": False},
    "gpt_oss": _GQA | _CHOOSE | {"head_dim": 16, "num_local_experts": NUM_EXPERTS, "sliding_window": 16},
    "glm4_moe": _GQA | _DEEPSEEK | {"head_dim": 16},
    "deepseek_v3": _MLA | _DEEPSEEK,
    "deepseek_v32": _MLA | _DEEPSEEK | _INDEXER,
    "glm_moe_dsa": _MLA | _DEEPSEEK | _INDEXER,
    "qwen3": _GQA | {"head_dim": 16},
}
MOE_MODELS = tuple(name for name in _EXTRA if name != "qwen3")


def build_model(name: str, **overrides: Any) -> PreTrainedModel:
    """A float32 model in train mode with the same weights at every call; `overrides` are config fields."""
    config = AutoConfig.for_model(name, **(_BASE | _EXTRA[name] | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if key.endswith(("gate.weight", "router.weight")):
                torch.nn.init.normal_(tensor, std=0.3)
            elif key.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(tensor, std=0.1)
    return model.train()
