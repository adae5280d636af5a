"""One packed micro-batch through the policy: log-probabilities of the sampled tokens over the supports sampling kept.

The one place where the sampling mask (stability/keep_sampling_mask.py) and the recorded experts
(stability/keep_routing.py) meet the model. Gradient mode is the caller's choice.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grpo.batch import TrainBatch
from grpo.policy.layers.attention import attention_kwargs
from grpo.policy.layers.head import Supports
from grpo.policy.model import PolicyModel
from stability import keep_routing


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model says about the N sampled tokens."""

    logprobs: Tensor  # float32 [N], with gradient
    entropy: Tensor  # float32 [N], in nats over the support, no gradient


def token_logprobs(model: PolicyModel, batch: TrainBatch) -> TokenLogprobs:
    """Runs the model over a packed batch, replaying its recorded experts if the model has replay installed.

    A model without it (the reference) routes by itself. Agreement with the recorded experts is counted in
    `model.routing`.

    Raises:
        CorruptRecordError: a sampled token is outside its own support.
    """
    supports = Supports(
        batch.rows, batch.kept_offsets, batch.kept_ids, batch.untruncated, batch.targets, batch.temperature
    )
    kwargs: dict[str, Any] = attention_kwargs(
        model.module, model.attention, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.parents
    )
    if model.routing is not None and batch.routed_experts is not None:
        kwargs[keep_routing.KEYWORD] = batch.routed_experts
    counting = model.routing.counting() if model.routing is not None else nullcontext()
    with model.head.over(supports), counting:
        output = model.module(input_ids=batch.token_ids[None], **kwargs)
    logprobs, entropy = output.logits[0]
    return TokenLogprobs(logprobs, entropy.detach())
