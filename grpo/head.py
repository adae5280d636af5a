"""The output layer's stand-in: log-probabilities over supports, computed inside the layer's own forward.

Shapes: N = sampled tokens, M = kept ids in all, d = hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stability.keep_sampling_mask import support_logprobs


@dataclass(frozen=True, slots=True)
class Supports:
    """What the head needs to answer with log-probabilities; fields as in `TrainBatch`."""

    offsets: Tensor  # int64 [N + 1]
    ids: Tensor  # int64 [M]
    untruncated: Tensor  # bool [N]
    targets: Tensor  # int64 [N]
    temperature: Tensor  # float32 [N]


class SupportHead:
    """Stands in for the output layer's forward, so that FSDP2 still gathers and frees its weight around it.

    Inside `over(supports)` a root forward with `logits_to_keep=rows` returns `.logits` [1, 2, N]: log-probabilities and
    entropies over the supports. Outside it returns plain logits.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear
        self._plain = linear.forward
        self._supports: Supports | None = None
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
        rows = hidden[0]  # [N, d]
        logprobs, entropy = support_logprobs(
            rows, self._linear.weight, s.offsets, s.ids, s.untruncated, s.targets, s.temperature
        )
        return torch.stack([logprobs[None], entropy[None]], dim=1)
