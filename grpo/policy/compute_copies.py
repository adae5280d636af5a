"""Mixed precision of a single rank: half-precision copies of the weights compute, float32 masters are trained.

What FSDP2 does for several ranks, without its copies into and out of communication buffers: a forward pass puts the
copies in the places of the parameters, and `drop` puts the masters back. In between every gradient that reaches a copy
is added to its master's float32 gradient and freed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class ComputeCopies:
    """The copies of one module's parameters; tied parameters share one."""

    def __init__(self, module: nn.Module) -> None:
        """Without `start` the module computes with its own parameters."""
        self._module = module
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._master_of: dict[Tensor, nn.Parameter] = {}

    def start(self, dtype: torch.dtype) -> None:
        """Every forward of the module computes in `dtype` from now on, until `drop` from the same copies."""
        self._places = [
            (owner, name, parameter)
            for owner in self._module.modules()
            for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
        ]
        self._module.register_forward_pre_hook(partial(self._install, dtype))

    def drop(self) -> None:
        """Puts the masters back and frees the copies; the next forward makes new ones from the masters as they are
        then."""
        if self._master_of:
            for owner, name, master in self._places:
                owner._parameters[name] = master
            self._master_of = {}

    def master_of(self, copy: Tensor) -> nn.Parameter | None:
        """The float32 parameter that a copy stands in for; None if `copy` is none or is frozen."""
        master = self._master_of.get(copy)
        return None if master is None or not master.requires_grad else master

    def gradient_of(self, copy: Tensor) -> Tensor | None:
        """The float32 gradient that belongs to a copy, to be added to directly; None if `copy` is none or is frozen."""
        master = self.master_of(copy)
        if master is None:
            return None
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    @torch.no_grad()
    def _install(self, dtype: torch.dtype, *_: Any) -> None:
        if self._master_of:
            return
        copies: dict[nn.Parameter, nn.Parameter] = {}
        for owner, name, master in self._places:
            if master not in copies:
                copies[master] = nn.Parameter(_cast(master, dtype), requires_grad=master.requires_grad)
                if master.requires_grad:
                    copies[master].register_post_accumulate_grad_hook(partial(_hand_over, master))
            owner._parameters[name] = copies[master]
        self._master_of = {copy: master for master, copy in copies.items()}


def _cast(master: Tensor, dtype: torch.dtype) -> Tensor:
    if not master.is_cuda or not master.is_contiguous():
        return master.to(dtype)
    from grpo.policy.layers import pointwise  # Triton comes with CUDA builds of torch only

    return pointwise.cast(master, dtype)


@torch.no_grad()
def _hand_over(master: nn.Parameter, copy: Tensor) -> None:
    """Adds a copy's gradient to its master's; there is none where a function has added to it already."""
    gradient, copy.grad = copy.grad, None
    if gradient is None:
        return
    total = torch.empty_like(master) if master.grad is None else master.grad
    if gradient.is_cuda and gradient.is_contiguous():
        from grpo.policy.layers import pointwise

        pointwise.accumulate(total, gradient, add=master.grad is not None)
    elif master.grad is None:
        total.copy_(gradient)
    else:
        total.add_(gradient)
    master.grad = total
