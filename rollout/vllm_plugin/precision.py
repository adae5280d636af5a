"""Sums that stay in float32 while weights and activations are half precision.

The learner can repeat what the engine computed only up to rounding, and three roundings of vLLM's are large and cost
next to nothing to leave out. Each cuts a value that was summed in float32 down to half precision just to store it:

- The logits. In bfloat16 a logit between 16 and 32 moves in steps of 0.125, which goes straight into the
  log-probability. vLLM has a switch for its output layer, `head_dtype` of the model's configuration.
- The router's logits, which decide which experts compute. A model that names a type for its router keeps it.
- The residual stream. Every layer adds to it twice; in half precision each addition cuts the whole sum, not just what
  was added. It is the largest part of the noise in the final hidden state.

Routers and norms are replaced through vLLM's own registry of out-of-tree layers. In float32 they do what they replace.
"""

from __future__ import annotations

from typing import Any

ENGINE_ARGUMENTS: dict[str, Any] = {
    "hf_overrides": {"head_dtype": "float32"},
    "additional_config": {"keel": "float32 sums"},
}
"""The output layer's weight is read as it is, not copied. The second entry only takes part in the key under which vLLM
keeps compiled models: without it a model that was compiled with vLLM's own norms would be taken from the cache."""


def keep_float32_sums() -> None:
    """Has the routers and norms of every model that vLLM builds from now on in this process keep their sums.

    To be called once per process. Routers only on CUDA, whose matrix product can hand out its accumulator.
    """
    import torch
    from torch import Tensor
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
    from vllm.model_executor.layers.layernorm import RMSNorm

    class Float32Router(GateLinear):
        """Answers in float32 unless the model has asked for a type."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.out_dtype is None and self._router_gemm_cublas_capable:
                self.set_out_dtype(torch.float32)

    class Float32ResidualNorm(RMSNorm):
        """Adds `x` [T, d] to a residual stream [T, d] that leaves in float32; the norm of the sum is cut once."""

        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
            if residual is None or x.dtype == torch.float32 or self.variance_size_override is not None:
                return super().forward(x, residual)
            total = residual.float() + x
            scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return (total * scale * self.weight).to(x.dtype), total

    GateLinear.register_oot(Float32Router)
    RMSNorm.register_oot(Float32ResidualNorm)
