"""Unbiased KL estimate: k3 with an importance weight (arXiv 2512.02556, section 3.1, equation 7).

With x = log pi_ref - log pi_theta and r = pi_theta / pi_old at a token drawn from pi_old,

    k = r * (exp(x) - x - 1),        E_old[k] = KL(pi_theta || pi_ref),        dk/dlog pi_theta = r * (log pi_theta -
    log pi_ref).

Without r (plain k3) the value and the gradient are those of another objective as soon as pi_theta != pi_old, and the
gradient's weight exp(x) - 1 explodes where pi_theta has become small. In k that exponential cancels: exp(x) * r =
pi_ref / pi_old does not depend on pi_theta. The gradient is computed in the cancelled form, so nothing needs a clamp.

Shapes: N = sampled tokens. All three log-probabilities must be normalised over the same support.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL_X = 1.0
"""Below it `expm1(x) - x` loses no digits; above it exp(x) may overflow where r underflows, so the product form is
taken."""


class _UnbiasedKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, policy: Tensor, reference: Tensor, behavior: Tensor) -> Tensor:
        x = reference - policy
        ratio = torch.exp(policy - behavior)
        ctx.save_for_backward(ratio * -x)
        near = ratio * (torch.expm1(x) - x)
        far = torch.exp(reference - behavior) - ratio * (x + 1)
        return torch.where(x < SMALL_X, near, far)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None, None


def unbiased_kl(policy_logprobs: Tensor, reference_logprobs: Tensor, behavior_logprobs: Tensor) -> Tensor:
    """Per-token k = r * (exp(x) - x - 1) with its closed-form gradient (arXiv 2512.02556, equation 7).

    Args:
        policy_logprobs: float [N], log pi_theta; the only argument that gets a gradient.
        reference_logprobs: float [N], log pi_ref.
        behavior_logprobs: float [N], log pi_old as the inference engine returned it.

    Returns:
        float [N], in nats; never negative beyond rounding.
    """
    result: Any = _UnbiasedKl.apply(policy_logprobs, reference_logprobs, behavior_logprobs)
    return result


def plain_k3(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Per-token k3 = exp(x) - x - 1 without the importance weight: biased off-policy, kept for comparison. float [N],
    nats.
    """
    x = reference_logprobs - policy_logprobs
    return torch.expm1(x) - x
