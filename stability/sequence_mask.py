"""Off-policy negative-sequence mask (arXiv 2512.02556, section 3.1, equations 8 and 9).

    M_i = 0  iff  A_i < 0  and  (1 / |o_i|) * sum_t log(pi_old(o_it) / pi_theta(o_it)) > delta;    else 1.

A negative sample that the policy has already moved away from teaches little and its ratio is noise, so its policy
term is dropped; its KL term and its length stay. Positive samples are never dropped.

Shapes: N = sampled tokens, B = samples. A sample's tokens must all be in the call: samples are never split over
batches.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def sequence_mask(
    policy_logprobs: Tensor, behavior_logprobs: Tensor, sample_ids: Tensor, advantages: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """One mask value per sequence, and the drift it is decided on (arXiv 2512.02556, equations 8 and 9).

    Args:
        policy_logprobs: float [N], log pi_theta.
        behavior_logprobs: float [N], log pi_old as the inference engine returned it.
        sample_ids: int64 [N], the sample of each token, in 0..B-1.
        advantages: float [B].
        delta: float [B], threshold in nats per token; +inf turns the mask off.

    Returns:
        mask [B] of zeros and ones, and drift [B] = mean over the sequence of log(pi_old / pi_theta) in nats per token
        (0 for a sample without sampled tokens); both of the log-probabilities' dtype and without gradient.
    """
    log_ratio = behavior_logprobs - policy_logprobs
    total = _sum_by_sample(log_ratio, sample_ids, len(advantages))
    count = log_ratio.new_zeros(len(advantages)).index_add_(0, sample_ids, torch.ones_like(log_ratio))
    drift = total / count.clamp_min(1)
    dropped = (advantages < 0) & (drift > delta)
    return (~dropped).to(log_ratio.dtype), drift


def _sum_by_sample(values: Tensor, sample_ids: Tensor, num_samples: int) -> Tensor:
    """Adds in the same order at every call: on a GPU `index_add_` does not, and a mask must not depend on that."""
    total = values.new_zeros(num_samples)
    if values.is_cuda:
        return total.index_put_((sample_ids,), values, accumulate=True)
    return total.index_add_(0, sample_ids, values)
