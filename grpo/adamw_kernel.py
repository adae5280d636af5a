"""One step of AdamW on one parameter: a Triton kernel that reads and writes every value once.

Needs Triton, which comes with CUDA builds of torch only.
"""

# Triton's kernel language and launches by subscript are not typed for checkers.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false
# ruff: noqa: PLR0913  a kernel takes its tensors one by one
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def adamw_step(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float,
) -> None:
    """The `step`-th step, counted from 1, with the gradient times `scale`; changes all but the gradient in place.

    Tensors are float32, contiguous and of one shape. Bias corrections and rates are computed in double precision here:
    a float32 next to one has lost most digits of its distance from it.
    """
    if not weight.numel():  # this rank's part of a sharded one
        return
    with torch.cuda.device_of(weight):
        adamw_kernel[(triton.cdiv(weight.numel(), BLOCK),)](
            weight,
            gradient,
            mean,
            square,
            weight.numel(),
            scale,
            lr * weight_decay,
            1 - betas[0],
            1 - betas[1],
            lr / (1 - betas[0] ** step),
            (1 - betas[1] ** step) ** -0.5,
            eps,
            BLOCK=BLOCK,
        )


@triton.jit
def adamw_kernel(
    weight_ptr,
    grad_ptr,
    mean_ptr,
    square_ptr,
    num_elements,
    scale,
    decay,
    mean_rate,
    square_rate,
    step_size,
    root_scale,
    eps,
    BLOCK: tl.constexpr,
):
    """Both moments move towards the gradient and its square by their rates; the weight decays and takes its step."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    grad = tl.load(grad_ptr + at, mask=inside) * scale
    mean = tl.load(mean_ptr + at, mask=inside)
    square = tl.load(square_ptr + at, mask=inside)
    weight = tl.load(weight_ptr + at, mask=inside)
    mean += mean_rate * (grad - mean)
    square += square_rate * (grad * grad - square)
    weight -= decay * weight + step_size * mean / (tl.sqrt(square) * root_scale + eps)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    tl.store(weight_ptr + at, weight, mask=inside)
