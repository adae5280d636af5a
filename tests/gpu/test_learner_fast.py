"""Fused layers and experts on a GPU in bfloat16 against the plain model: no further from float32 than rounding is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.batch import TrainBatch
from grpo.logprobs import token_logprobs
from grpo.policy.layers import decoder, experts
from grpo.policy.model import PolicyModel, prepare_policy, reshard, shard_policy
from tests.grpo.batches import pack_by_hand, random_sequences
from tests.moe_models import build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WIDE: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": WIDE,
    "qwen3_moe": {**WIDE, "moe_intermediate_size": 96},
    "mixtral": WIDE,
    "qwen2_moe": {},  # fused experts in plain layers
    "deepseek_v3": {},
}
LENGTHS = [(30, 70), (1, 1), (5, 200), (64, 64), (3, 128)]


def make_policy(name: str, *, dtype: torch.dtype, checkpointing: bool = False) -> PolicyModel:
    """The same random model at every call, on the GPU; norms are not all one."""
    module = build_model(name, **MODELS[name])
    generator = torch.Generator().manual_seed(4)
    for key, parameter in module.named_parameters():
        if "norm" in key:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    policy = prepare_policy(module, keep_routing=True, gradient_checkpointing=checkpointing)
    shard_policy(policy, compute_dtype=dtype, world_size=1)
    return policy


def make_batch(name: str, seed: int = 0) -> TrainBatch:
    routes = None if name == "qwen3" else (3, 16, 4)
    return pack_by_hand(random_sequences(LENGTHS, vocab_size=98, seed=seed, routes=routes)).to(torch.device("cuda"))


def run(policy: PolicyModel, batches: list[TrainBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of all batches, and gradients of their loss; all forwards come before all backwards."""
    policy.module.zero_grad(set_to_none=True)
    logprobs = [token_logprobs(policy, batch).logprobs for batch in batches]
    for batch, values in zip(batches, logprobs, strict=True):
        (-(batch.loss_weights * values).sum()).backward()
    reshard(policy)
    grads = {name: p.grad for name, p in policy.module.named_parameters() if p.grad is not None}
    return torch.cat(logprobs).detach(), grads


@pytest.mark.parametrize("name", MODELS)
def test_fused_is_as_near_to_float32_as_plain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [make_batch(name), make_batch(name, seed=1)]
    fused_logprobs, fused = run(make_policy(name, dtype=torch.bfloat16), batches)
    monkeypatch.setattr(decoder, "install", lambda module: None)
    monkeypatch.setattr(experts, "install", lambda module, copies: None)
    plain_logprobs, plain = run(make_policy(name, dtype=torch.bfloat16), batches)
    exact_logprobs, exact = run(make_policy(name, dtype=torch.float32), batches)
    assert not torch.equal(fused_logprobs, plain_logprobs), "the fused path was not taken"
    assert (fused_logprobs - exact_logprobs).abs().mean() < 1.3 * (plain_logprobs - exact_logprobs).abs().mean()
    assert fused.keys() == plain.keys() == exact.keys()
    for key, want in exact.items():
        fused_error, plain_error = (float((grads[key] - want).norm() / want.norm()) for grads in (fused, plain))
        assert fused_error < max(1.5 * plain_error, 0.01), (key, fused_error, plain_error)


@pytest.mark.parametrize("name", MODELS)
def test_two_runs_give_the_same_bits(name: str) -> None:
    policy, batches = make_policy(name, dtype=torch.bfloat16), [make_batch(name), make_batch(name, seed=1)]
    first, second = run(policy, batches), run(policy, batches)
    assert torch.equal(first[0], second[0])
    assert [key for key, grad in first[1].items() if not torch.equal(grad, second[1][key])] == []


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_checkpointing_changes_no_bit_even_when_micro_batches_interleave(name: str) -> None:
    batches = [make_batch(name), make_batch(name, seed=1)]
    plain = run(make_policy(name, dtype=torch.bfloat16), batches)
    checkpointed = run(make_policy(name, dtype=torch.bfloat16, checkpointing=True), batches)
    assert torch.equal(plain[0], checkpointed[0])
    assert [key for key, grad in plain[1].items() if not torch.equal(grad, checkpointed[1][key])] == []


def test_experts_that_no_token_chose_have_a_gradient_of_zero() -> None:
    policy, batch = make_policy("qwen3_moe", dtype=torch.bfloat16), make_batch("qwen3_moe")
    assert batch.routed_experts is not None
    batch.routed_experts[:] = torch.tensor([0, 2, 5, 7], dtype=torch.int16)
    _, grads = run(policy, [batch])
    for key in (k for k in grads if "experts" in k):
        chosen = grads[key].flatten(1).abs().amax(1) > 0
        assert chosen.nonzero()[:, 0].tolist() == [0, 2, 5, 7], key


def test_gradients_of_experts_are_never_rounded_to_half_precision() -> None:
    _, grads = run(make_policy("qwen3_moe", dtype=torch.bfloat16), [make_batch("qwen3_moe")])
    experts_grads = {key: grad for key, grad in grads.items() if "experts" in key}
    assert len(experts_grads) == 2 * 3
    for key, grad in experts_grads.items():
        assert (grad.bfloat16().float() != grad).float().mean() > 0.1, key


def test_copies_are_the_masters_rounded_to_nearest() -> None:
    policy = make_policy("qwen3", dtype=torch.bfloat16)
    masters = dict(policy.module.named_parameters())
    token_logprobs(policy, make_batch("qwen3"))
    copies = dict(policy.module.named_parameters())
    assert all(torch.equal(copies[name], master.bfloat16()) for name, master in masters.items())
    reshard(policy)
