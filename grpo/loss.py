"""Losses over one micro-batch: the GRPO objective with the stability fixes, and plain fine-tuning.

A loss is a sum over tokens of `batch.loss_weights` times a per-token term. The weights are fixed over the whole
update before (1 / (number of samples * |o_i|) for the paper's mean), so micro-batches and ranks just add up.

Shapes: N = sampled tokens, B = samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.batch import TrainBatch
from stability.sequence_mask import sequence_mask
from stability.unbiased_kl import plain_k3, unbiased_kl


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Everything a loss may look at."""

    policy_logprobs: Tensor  # float [N], with gradient
    reference_logprobs: Tensor | None  # float [N]; None = no reference is held, every beta is 0
    entropy: Tensor  # float [N], nats over the support
    batch: TrainBatch


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The scalar to minimise and what to log about it, none of it with gradient but the loss."""

    loss: Tensor  # scalar
    token_stats: dict[str, Tensor]
    """Per sampled token, [N]: `ratio`, `log_ratio`, `clipped` (0/1), `kl` (nats), `entropy` (nats)."""
    sample_stats: dict[str, Tensor]
    """Per sample, [B]: `masked` (0/1), `drift` (mean log(pi_old / pi_theta), nats per token)."""


LossFn = Callable[[LossInputs], LossOutput]


def grpo_loss(inputs: LossInputs) -> LossOutput:
    """GRPO with off-policy sequence mask and unbiased KL (arXiv 2512.02556, section 3.1); the knobs are each sample's
    own.

        loss = -sum_t w_t * [ M * min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) - beta * k ],    r = pi_theta / pi_old

    Raises:
        ValueError: a beta is above zero but there is no reference.
    """
    batch, sample_ids = inputs.batch, inputs.batch.sample_ids
    log_ratio = inputs.policy_logprobs - batch.behavior_logprobs
    ratio = torch.exp(log_ratio)
    advantages = batch.advantages[sample_ids]
    unclipped = ratio * advantages
    clipped = torch.clamp(ratio, 1 - batch.eps_low[sample_ids], 1 + batch.eps_high[sample_ids]) * advantages
    mask, drift = sequence_mask(
        inputs.policy_logprobs, batch.behavior_logprobs, sample_ids, batch.advantages, batch.delta
    )
    kl = _kl(inputs)
    objective = mask[sample_ids] * torch.minimum(unclipped, clipped) - batch.beta[sample_ids] * kl
    token_stats = {
        "ratio": ratio.detach(),
        "log_ratio": log_ratio.detach(),
        "clipped": (clipped < unclipped).to(ratio.dtype),
        "kl": kl.detach(),
        "entropy": inputs.entropy,
    }
    return LossOutput(-(batch.loss_weights * objective).sum(), token_stats, {"masked": 1 - mask, "drift": drift})


def _kl(inputs: LossInputs) -> Tensor:
    """Per-token KL estimate [N] in nats; zero where no reference is held."""
    batch, reference = inputs.batch, inputs.reference_logprobs
    if reference is None:
        if batch.needs_reference:
            raise ValueError(
                "stability.beta is above 0 for a sample of this batch, but no reference_logprobs were computed"
            )
        return torch.zeros_like(inputs.policy_logprobs)
    if batch.unbiased_kl:
        return unbiased_kl(inputs.policy_logprobs, reference, batch.behavior_logprobs)
    return plain_k3(inputs.policy_logprobs, reference)


def sft_loss(inputs: LossInputs) -> LossOutput:
    """Fine-tuning on the tokens as they are: loss = -sum_t w_t * log pi_theta(o_t)."""
    token_stats = {"entropy": inputs.entropy}
    return LossOutput(-(inputs.batch.loss_weights * inputs.policy_logprobs).sum(), token_stats, {})
