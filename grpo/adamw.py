"""AdamW over float32 master weights, and its learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo.config import LearnerConfig


class ScalingAdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov and Hutter 2019, algorithm 2), whose steps scale the gradients as they are read.

    On a GPU one Triton kernel reads and writes each weight and its moments once, so that clipping costs no pass over
    the gradients. Parameters are float32, plain or sharded by FSDP2; state and checkpoints are torch's.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: LearnerConfig) -> None:
        parameters = list(parameters)
        self._on_gpu = parameters[0].is_cuda
        for parameter in parameters:
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.contiguous()
        super().__init__(
            parameters,
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=not self._on_gpu,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, for a state from whichever kind of device."""
        groups = [{**group, "fused": not self._on_gpu} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})

    @torch.no_grad()
    def step_scaled(self, scale: float) -> None:
        """One step with every gradient multiplied by `scale`; on a GPU the gradients themselves stay as they are."""
        (group,) = self.param_groups
        gradients = {p: p.grad for p in group["params"] if p.grad is not None}
        if self._on_gpu:
            for parameter, gradient in gradients.items():
                self._step_on_gpu(parameter, gradient, scale, group)
            return
        if scale != 1:
            torch._foreach_mul_(list(gradients.values()), scale)  # pyright: ignore[reportPrivateImportUsage]
        self.step()

    def _step_on_gpu(self, parameter: nn.Parameter, gradient: Tensor, scale: float, group: dict[str, Any]) -> None:
        from grpo.adamw_kernel import adamw_step  # Triton comes with CUDA builds of torch only

        state = self.state[parameter]
        if not state:  # as torch begins it
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        tensors = (parameter, gradient.contiguous(), state["exp_avg"], state["exp_avg_sq"])
        knobs = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        adamw_step(*map(_local, tensors), step=int(state["step"]), scale=scale, **knobs)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def learning_rate(config: LearnerConfig, update: int, total_updates: int) -> float:
    """Linear warm-up, then constant or a half cosine to zero at `total_updates`."""
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (update - config.warmup_steps) / max(1, total_updates - config.warmup_steps)
    return config.lr * 0.5 * (1 + float(np.cos(np.pi * min(1.0, progress))))
