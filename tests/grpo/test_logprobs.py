"""Packed log-probabilities with replay and supports against plain transformers, one sequence at a time, in dense
float64 maths.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.batch import TrainBatch
from grpo.logprobs import token_logprobs
from grpo.policy.model import PolicyModel, prepare_policy
from stability.keep_routing import decoder_layers
from stability.keep_sampling_mask import CorruptRecordError
from tests.grpo.batches import HandSequence, pack_by_hand, random_sequences
from tests.moe_models import NUM_EXPERTS, NUM_LAYERS, NUM_SLOTS, VOCAB_SIZE, build_model

LENGTHS = [(5, 9), (1, 1), (12, 3), (3, 20), (4, 9)]
MODELS = ("qwen3_moe", "deepseek_v3", "gpt_oss", "deepseek_v32")


class _ForcedRouter(nn.Module):
    """An independent replay: a softmax router that looks its experts up, row by row."""

    def __init__(self, router: Any, ids: Tensor) -> None:
        super().__init__()
        self.weight, self.norm, self.ids = router.weight, router.norm_topk_prob, ids

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probs = (hidden @ self.weight.T).softmax(-1)
        rows = [p.topk(NUM_SLOTS).indices if i[0] < 0 else i.long() for p, i in zip(probs, self.ids, strict=True)]
        ids = torch.stack(rows)
        gates = probs.gather(-1, ids)
        return probs, gates / gates.sum(-1, keepdim=True) if self.norm else gates, ids


def plain_logprobs(model: PreTrainedModel, sequence: HandSequence) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies over the supports from the full logits of one sequence."""
    logits = model(input_ids=torch.tensor([sequence.token_ids]), use_cache=False).logits[0].double()
    logprobs, entropies = [], []
    for t, (token, support) in enumerate(zip(sequence.sampled, sequence.supports, strict=True)):
        z = logits[sequence.num_prompt - 1 + t] / sequence.temperature
        names = support or list(range(VOCAB_SIZE))
        over_support = z[names].log_softmax(-1)
        logprobs.append(over_support[names.index(token)])
        entropies.append(-(over_support.exp() * over_support).sum())
    return torch.stack(logprobs), torch.stack(entropies).detach()


def plain_reference(model: PreTrainedModel, sequences: list[HandSequence]) -> tuple[Tensor, Tensor]:
    parts = [plain_logprobs(model, sequence) for sequence in sequences]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def run(policy: PolicyModel, batch: TrainBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    got = token_logprobs(policy, batch)
    (batch.loss_weights * got.logprobs).sum().backward()
    return got.logprobs.detach(), got.entropy, gradients(policy.module)


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_supports_equal_plain_transformers(name: str, checkpointing: bool) -> None:
    sequences = random_sequences(LENGTHS, vocab_size=VOCAB_SIZE)
    batch = pack_by_hand(sequences)
    plain = build_model(name)
    for key, parameter in plain.named_parameters():
        parameter.requires_grad_(".indexer." not in key)
    want, want_entropy = plain_reference(plain, sequences)
    (batch.loss_weights * want).sum().backward()
    policy = prepare_policy(build_model(name), keep_routing=True, gradient_checkpointing=checkpointing)
    logprobs, entropy, got = run(policy, batch)
    torch.testing.assert_close(logprobs.double(), want.detach(), rtol=0, atol=3e-6)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=0, atol=3e-6)
    assert not entropy.requires_grad
    assert_same_gradients(got, gradients(plain))


def test_replayed_experts_equal_an_independent_replay() -> None:
    """Random experts on all rows but the first and last of each sequence, which the engine has no record of."""
    sequences = random_sequences(LENGTHS, vocab_size=VOCAB_SIZE, routes=(NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS))
    batch = pack_by_hand(sequences)
    plain = build_model("qwen3_moe")
    blocks: list[Any] = [layer.mlp for layer in decoder_layers(plain)]
    routers = [block.gate for block in blocks]
    parts = []
    for sequence in sequences:
        assert sequence.routed_experts is not None
        for index, block in enumerate(blocks):
            block.gate = _ForcedRouter(routers[index], torch.from_numpy(sequence.routed_experts[:, index]))
        parts.append(plain_logprobs(plain, sequence)[0])
    want = torch.cat(parts)
    (batch.loss_weights * want).sum().backward()
    policy = prepare_policy(build_model("qwen3_moe"), keep_routing=True, gradient_checkpointing=True)
    logprobs, _, got = run(policy, batch)
    torch.testing.assert_close(logprobs.double(), want.detach(), rtol=0, atol=3e-6)
    assert_same_gradients(got, gradients(plain))
    own = token_logprobs(
        prepare_policy(build_model("qwen3_moe"), keep_routing=False, gradient_checkpointing=False), batch
    )
    assert (own.logprobs - logprobs).abs().max() > 1e-2, "a model without replay routes by itself"
    assert policy.routing is not None
    known = sum(len(s.token_ids) - (2 if len(s.token_ids) > 1 else 1) for s in sequences)
    assert policy.routing.agreement()[:, 1].tolist() == [known * NUM_SLOTS] * NUM_LAYERS


def test_any_packing_gives_the_same_gradient() -> None:
    """One row of five sequences, or five rows, or another order: weights are fixed before, so gradients add up."""
    sequences = random_sequences(LENGTHS, vocab_size=VOCAB_SIZE, routes=(NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS))
    together = prepare_policy(build_model("qwen3_moe"), keep_routing=True, gradient_checkpointing=False)
    _, _, want = run(together, pack_by_hand(sequences))
    for rows in ([[s] for s in sequences], [sequences[::-1]], [sequences[3:], sequences[:3]]):
        policy = prepare_policy(build_model("qwen3_moe"), keep_routing=True, gradient_checkpointing=False)
        for row in rows:
            share = len(row) / len(sequences)
            (share * (pack := pack_by_hand(row)).loss_weights * token_logprobs(policy, pack).logprobs).sum().backward()
        assert_same_gradients(gradients(policy.module), want)


def test_plain_logits_come_back_after_a_batch() -> None:
    policy = prepare_policy(build_model("qwen3"), keep_routing=True, gradient_checkpointing=False)
    batch = pack_by_hand(random_sequences(LENGTHS, vocab_size=VOCAB_SIZE))
    token_logprobs(policy, batch)
    policy.module.set_attn_implementation("sdpa")
    assert policy.module(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits.shape == (1, 3, VOCAB_SIZE)


def test_a_corrupt_record_stops_and_leaves_the_model_usable() -> None:
    policy = prepare_policy(build_model("qwen3"), keep_routing=True, gradient_checkpointing=False)
    broken = pack_by_hand([HandSequence([5, 6, 7, 8], 2, [[7], [9, 10]])])
    with pytest.raises(CorruptRecordError, match="1 of 2"):
        token_logprobs(policy, broken)
    batch = pack_by_hand(random_sequences(LENGTHS, vocab_size=VOCAB_SIZE))
    assert torch.isfinite(token_logprobs(policy, batch).logprobs).all()
