"""The experts' own implementation against transformers' eager one, forward and backward, on every family of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.policy.compute_copies import ComputeCopies
from grpo.policy.layers import experts
from tests.moe_models import MOE_MODELS, NUM_EXPERTS, NUM_SLOTS, VOCAB_SIZE, build_model

OTHER_EXPERTS = {"gpt_oss"}
"""Biases and an activation of their own: transformers' grouped products serve them."""


def logits_and_grads(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    token_ids = torch.randint(3, VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(6))
    logits = model(input_ids=token_ids, use_cache=False).logits
    named = {name: p for name, p in model.named_parameters() if ".indexer." not in name}
    return logits.detach(), dict(
        zip(named, torch.autograd.grad(logits.square().mean(), list(named.values())), strict=True)
    )


@pytest.mark.parametrize("name", MOE_MODELS)
def test_logits_and_gradients_equal_the_eager_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(name)
    model.set_experts_implementation("eager")
    want, want_grads = logits_and_grads(model)
    experts.install(model, ComputeCopies(model))
    calls: list[int] = []
    sort = experts.sort_by_expert
    monkeypatch.setattr(experts, "sort_by_expert", lambda *args: calls.append(1) or sort(*args))
    got, got_grads = logits_and_grads(model)
    assert bool(calls) is (name not in OTHER_EXPERTS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    for key, grad in want_grads.items():
        torch.testing.assert_close(got_grads[key], grad, rtol=0, atol=1e-6, msg=key)


def layer() -> tuple[Any, Tensor, Tensor, Tensor]:
    """Experts, hidden states, ids that leave half of the experts alone, and gate weights."""
    model: Any = build_model("qwen3_moe")
    module = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(9, 64, generator=generator).requires_grad_()
    ids = torch.rand(9, NUM_EXPERTS // 2, generator=generator).topk(NUM_SLOTS).indices * 2
    weights = torch.rand(9, NUM_SLOTS, generator=generator).requires_grad_()
    return module, hidden, ids, weights


def test_experts_without_tokens_have_a_gradient_of_zero() -> None:
    module, hidden, ids, weights = layer()
    experts.experts_forward(ComputeCopies(module), module, hidden, ids, weights).sum().backward()
    for parameter in (module.gate_up_proj, module.down_proj):
        used = parameter.grad.flatten(1).abs().amax(1) > 0
        assert used.tolist() == [expert in ids for expert in range(NUM_EXPERTS)]


def test_sorting_keeps_tokens_in_order() -> None:
    ids = torch.tensor([[3, 0], [0, 3], [1, 3]])
    row_of_pair, ends = experts.sort_by_expert(ids, 5)
    assert row_of_pair.tolist() == [[3, 0], [1, 4], [2, 5]]
    assert ends.tolist() == [2, 3, 3, 6, 6]
