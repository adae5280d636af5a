"""What one rank gives the others to begin with: all of a loaded model but its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from benchmarks.memory import anonymous_bytes
from grpo.logprobs import token_logprobs
from grpo.policy.model import PolicyModel, checkpoint_tensors, load_policy, prepare_policy
from grpo.policy.outline import from_outline, take_outline
from tests.grpo.batches import pack_by_hand, random_sequences
from tests.moe_models import MOE_MODELS, NUM_EXPERTS, NUM_LAYERS, NUM_SLOTS, VOCAB_SIZE, build_model

MIB = 1 << 20


def logprobs_and_gradients(policy: PolicyModel) -> dict[str, Tensor]:
    routes = (NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS)
    sequences = random_sequences([(5, 9), (2, 3), (4, 7)], vocab_size=VOCAB_SIZE, routes=routes)
    logprobs = token_logprobs(policy, pack_by_hand(sequences)).logprobs
    logprobs.sum().backward()
    gradients: dict[str, Tensor | None] = {name: p.grad for name, p in policy.module.named_parameters()}
    return {"": logprobs.detach()} | {name: grad for name, grad in gradients.items() if grad is not None}


@pytest.mark.parametrize("name", MOE_MODELS)
def test_with_its_weights_it_is_the_same_model(name: str, tmp_path: Path) -> None:
    """Fused layers, replay, head and checkpointing included, and the names of the checkpoint that was read."""
    asked_for = {
        "output_hidden_states": True,
        "output_router_logits": True,
    }  # by hooks that nothing pickles
    build_model(name, **asked_for).save_pretrained(tmp_path)
    policy = load_policy(tmp_path, keep_routing=True, gradient_checkpointing=True)
    rebuilt: PolicyModel = from_outline(take_outline(policy))
    rebuilt.module.load_state_dict(policy.module.state_dict())
    want, got = logprobs_and_gradients(policy), logprobs_and_gradients(rebuilt)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # what is read from a file lies otherwise in memory
    sent = dict(checkpoint_tensors(policy, torch.bfloat16))
    torch.testing.assert_close(dict(checkpoint_tensors(rebuilt, torch.bfloat16)), sent, rtol=0, atol=0)


def test_tied_weights_stay_tied() -> None:
    policy = prepare_policy(
        build_model("qwen3", tie_word_embeddings=True), keep_routing=True, gradient_checkpointing=False
    )
    module: Any = from_outline(take_outline(policy)).module
    assert module.get_input_embeddings().weight is module.get_output_embeddings().weight
    frozen = from_outline(take_outline(nn.Linear(2, 3).requires_grad_(False)))
    assert [p.requires_grad for p in frozen.parameters()] == [False, False]


def test_hooks_that_come_later_do_not_take_the_place_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch numbers hooks by process, and a process that reads an outline may have counted less far."""
    module = nn.Linear(2, 3)
    for _ in range(3):
        module.register_forward_hook(print)
    outline = take_outline(module)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    rebuilt = from_outline(outline)
    rebuilt.register_forward_hook(repr)
    assert list(rebuilt._forward_hooks.values()) == [print, print, print, repr]


def test_weights_take_no_memory_until_they_are_written() -> None:
    module = nn.Linear(1 << 13, 1 << 13)
    outline = take_outline(module)
    before = anonymous_bytes()
    rebuilt = from_outline(outline)
    assert anonymous_bytes() - before < 16 * MIB < rebuilt.weight.nbytes / 10
    with torch.no_grad():
        rebuilt.weight.copy_(module.weight)
    assert anonymous_bytes() - before > 250 * MIB, "the measure must see weights that are there"
