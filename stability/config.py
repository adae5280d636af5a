"""The stability knobs of DeepSeek-V3.2 (arXiv 2512.02556, section 3.1). Each number can be overridden per domain."""

from __future__ import annotations

from pydantic import BaseModel, Field


class StabilityConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """One field per fix; formulas live in the files of this package."""

    beta: float = Field(default=0.0, ge=0)
    """Strength of the unbiased KL to the frozen reference (equation 7); 0 everywhere = no reference model is loaded."""
    delta: float | None = Field(default=0.5, gt=0)
    """Off-policy negative-sequence mask (equations 8, 9): threshold on the mean of log(pi_old / pi_theta), in nats per
    token. Unset with `delta = "off"`."""
    eps_low: float = Field(default=0.2, gt=0, lt=1)
    """Lower clip of the ratio: 1 - eps_low."""
    eps_high: float = Field(default=0.2, gt=0)
    """Upper clip of the ratio: 1 + eps_high."""
    unbiased_kl: bool = True
    """False uses the plain k3 estimator, without the importance weight: biased off-policy, kept for comparison."""
    keep_routing: bool = True
    """Record the experts that generation used and force them in training."""
    keep_sampling_mask: bool = True
    """Record the ids that survived top-p/top-k and renormalise training over them."""
    allow_biased_truncation: bool = False
    """Allow truncated sampling although `keep_sampling_mask` is off: every ratio is then wrong by the cut-off mass."""
    max_parity_error: float | None = Field(default=None, gt=0)
    """Largest mean |log pi_learner - log pi_engine| that the parity probe accepts after a weight sync, in nats; the
    default follows the engine's dtype (0.001 for float32, 0.15 for half precision)."""
