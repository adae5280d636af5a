"""The output layer's stand-in: log-probabilities over supports, computed inside the layer's own forward.

Shapes: N = sampled tokens, M = kept ids in all, d = hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo.policy.compute_copies import ComputeCopies
from stability.keep_sampling_mask import support_logprobs


@dataclass(frozen=True, slots=True)
class Supports:
    """What the head needs to answer with log-probabilities; fields as in `TrainBatch`."""

    rows: Tensor  # int64 [N], each once
    offsets: Tensor  # int64 [N + 1]
    ids: Tensor  # int64 [M]
    untruncated: Tensor  # bool [N]
    targets: Tensor  # int64 [N]
    temperature: Tensor  # float32 [N]


class SupportHead:
    """Stands in for the output layer's forward, so that FSDP2 still gathers and frees its weight around it.

    Inside `over(supports)` a root forward returns `.logits` [1, 2, N]: log-probabilities and entropies over the
    supports at their rows. Outside it returns plain logits.
    """

    def __init__(self, linear: nn.Linear, copies: ComputeCopies) -> None:
        """Where `linear` computes with a copy of its weight, the gradient is added straight to the master's: nothing of
        the weight's size is zeroed, rounded or added for a micro-batch."""
        self._linear = linear
        self._plain = linear.forward
        self._supports: Supports | None = None
        self._copies = copies
        linear.forward = self._forward  # pyright: ignore[reportAttributeAccessIssue]

    @contextmanager
    def over(self, supports: Supports) -> Iterator[None]:
        """Answers with log-probabilities over these supports in the forward pass inside."""
        self._supports = supports
        try:
            yield
        finally:
            self._supports = None

    def _forward(self, hidden: Tensor) -> Tensor:
        s = self._supports
        if s is None:
            return self._plain(hidden)
        rows: Any = _Rows.apply(hidden.squeeze(0), s.rows)  # [N, d]
        weight = self._linear.weight
        summed_in = self._copies.gradient_of(weight) if torch.is_grad_enabled() else None
        logprobs, entropy = support_logprobs(
            rows,
            weight,
            s.offsets,
            s.ids,
            s.untruncated,
            s.targets,
            s.temperature,
            weight_grad_accumulator=summed_in,
        )
        return torch.stack([logprobs[None], entropy[None]], dim=1)


class _Rows(torch.autograd.Function):
    """`x[rows]` whose gradient is one scatter: no row is named twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).index_copy_(0, rows, grads[0]), None
