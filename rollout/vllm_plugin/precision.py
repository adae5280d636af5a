"""Logits in float32 while weights and activations stay in half precision: what the sampler and the routers decide by.

vLLM rounds both to the model's type. In bfloat16 a logit between 16 and 32 then moves in steps of 0.125, which goes
straight into the log-probability that the engine reports, and no learner can know which way it was rounded. Here the
two products leave their float32 accumulator as it is; the weights are read as they are and never copied.

- Output layer: vLLM's own `head_dtype` of the model's configuration.
- Routers: vLLM's registry of replaced layers. A model that names a type for its router keeps it (DeepSeek's is float32
  already). Only on CUDA, where the product can be had in float32 for nothing.
"""

from __future__ import annotations

from typing import Any

HEAD_OVERRIDES: dict[str, Any] = {"head_dtype": "float32"}
"""For vLLM's `hf_overrides`."""


def keep_router_logits() -> None:
    """Has every router that vLLM builds from now on in this process answer in float32.

    To be called once per process, before a model is built.
    """
    import torch
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear

    class Float32GateLinear(GateLinear):
        """vLLM's router product with its float32 sum as the answer, unless the model has asked for another type."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._is_default = self.out_dtype is None and self._router_gemm_cublas_capable
            if self._is_default:
                super().set_out_dtype(torch.float32)

        def set_out_dtype(self, out_dtype: torch.dtype) -> None:
            """The model's own choice, made after construction, stands."""
            if self._is_default:
                self.out_dtype, self._is_default = None, False
            super().set_out_dtype(out_dtype)

    GateLinear.register_oot(Float32GateLinear)
