"""Log-probabilities over the supports that sampling kept (Keep Sampling Mask, arXiv 2512.02556, section 3.1).

With z = W h / temperature at a sampled token and S its recorded support,

    log pi^S(o) = z_o - log sum_{v in S} exp(z_v),        H = -sum_{v in S} pi^S(v) log pi^S(v).

Only the rows of W that belong to some S are read: the cost follows the kept ids, not the vocabulary. Rows without
truncation, rows with very wide sets, and small vocabularies take a dense path that holds a bounded number of logits
and computes them again in the backward pass.

Shapes: N = sampled tokens, M = kept ids in all (CSR), d = hidden width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

WIDE_SET = 1024
"""Gathering that many rows of W costs as much as the dense product: a wider set takes the dense path."""
SMALL_VOCABULARY = 256
"""Up to this vocabulary the dense product is the cheaper one for any set."""
CPU_GATHER_BUDGET = 2**21
"""Gathered elements (ids x d) held at once on a CPU: what stays in its cache is three times as fast as 2**23."""
GPU_GATHER_BUDGET = 2**26
"""The same on a GPU, where few large launches are better."""
DENSE_BUDGET = 2**26
"""Logits (rows x V) held at once."""


class CorruptRecordError(ValueError):
    """A sampled token that is not in its own recorded support: the record is wrong and must not be trained on."""


def support_logprobs(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    ids: Tensor,
    untruncated: Tensor,
    targets: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target over its support, and the entropy over it.

    Args:
        hidden: float [N, d], the head's input at the sampled tokens.
        weight: float [V, d], the head.
        offsets: int64 [N + 1], CSR rows of the supports; an untruncated row is empty.
        ids: int64 [M], kept token ids, each once per row.
        untruncated: bool [N], True where the support is the whole vocabulary.
        targets: int64 [N], the sampled tokens.
        temperature: float32 [N].

    Returns:
        logprobs [N] with gradients to `hidden` and `weight`, entropy [N] in nats without; float32, or float64 for
        float64 inputs.

    Raises:
        CorruptRecordError: a target is outside its support.
    """
    if len(weight) <= SMALL_VOCABULARY:
        return _dense_logprobs(hidden, weight, offsets, ids, untruncated, targets, temperature)
    dense = untruncated | (offsets.diff() > WIDE_SET)
    num_dense = int(dense.sum())  # the one wait for the device on this path
    if num_dense == 0:
        return kept_logprobs(hidden, weight, offsets, ids, targets, temperature)
    if num_dense == len(targets):
        return _dense_logprobs(hidden, weight, offsets, ids, untruncated, targets, temperature)
    dense_rows, kept_rows = dense.nonzero()[:, 0], (~dense).nonzero()[:, 0]
    from_dense = _dense_logprobs(
        hidden[dense_rows],
        weight,
        *_select_rows(offsets, ids, dense),
        untruncated[dense_rows],
        targets[dense_rows],
        temperature[dense_rows],
    )
    from_kept = kept_logprobs(
        hidden[kept_rows], weight, *_select_rows(offsets, ids, ~dense), targets[kept_rows], temperature[kept_rows]
    )
    order = torch.cat([dense_rows, kept_rows]).argsort()
    logprobs, entropy = (torch.cat(parts)[order] for parts in zip(from_dense, from_kept, strict=True))
    return logprobs, entropy


def kept_logprobs(
    hidden: Tensor, weight: Tensor, offsets: Tensor, ids: Tensor, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """`support_logprobs` for rows that all have a recorded set, reading only the rows of `weight` named in `ids`.

    Sums run in float32 (float64 for float64 inputs) whatever the inputs' type; one float per kept id is saved for
    backward.
    """
    return _KeptLogprobs.apply(hidden, weight, offsets, ids, targets, temperature)  # pyright: ignore[reportReturnType]


def _dense_logprobs(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    """`support_logprobs` by the dense path, same arguments."""
    return _DenseLogprobs.apply(*arguments)  # pyright: ignore[reportReturnType]


class _KeptLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, offsets: Tensor, ids: Tensor, targets: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = _row_of_id(offsets, len(ids))
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        z = torch.empty(len(ids), dtype=dtype, device=hidden.device)
        for part in _gather_parts(ids, hidden):
            z[part] = (weight[ids[part]].to(dtype) * hidden[rows[part]].to(dtype)).sum(-1)
        z /= temperature[rows]
        is_target = ids == targets[rows]
        lowest = z.new_full((len(targets),), -torch.inf)
        z_target = lowest.scatter_reduce(0, rows, z.masked_fill(~is_target, -torch.inf), "amax")
        _check_found(z_target)
        highest = lowest.scatter_reduce(0, rows, z, "amax")
        lse = highest + z.new_zeros(len(targets)).index_add_(0, rows, torch.exp(z - highest[rows])).log()
        probs = torch.exp(z - lse[rows])
        entropy = lse - z.new_zeros(len(targets)).index_add_(0, rows, probs * z)
        ctx.save_for_backward(hidden, weight, ids, rows, probs, is_target, temperature)
        ctx.mark_non_differentiable(entropy)
        return z_target - lse, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, rows, probs, is_target, temperature = ctx.saved_tensors
        dz = (is_target.to(probs.dtype) - probs) * (grads[0] / temperature)[rows]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden, dtype=probs.dtype) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=probs.dtype) if wants_weight else None
        for part in _gather_parts(ids, hidden):
            if grad_hidden is not None:
                grad_hidden.index_add_(0, rows[part], weight[ids[part]].to(probs.dtype) * dz[part, None])
            if grad_weight is not None:
                grad_weight.index_add_(0, ids[part], hidden[rows[part]].to(probs.dtype) * dz[part, None])
        return _cast(grad_hidden, hidden), _cast(grad_weight, weight), None, None, None, None


class _DenseLogprobs(torch.autograd.Function):
    """All logits of a few rows at a time; rows with a set are masked by it."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, offsets, ids, untruncated, targets, temperature = arguments
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        z_target, lse, entropy = (torch.empty(len(targets), dtype=dtype, device=hidden.device) for _ in range(3))
        ctx.parts = list(_parts(len(targets), len(weight), DENSE_BUDGET))
        ctx.bounds = [(0, len(ids))] if len(ctx.parts) == 1 else _id_bounds(offsets, ctx.parts)
        masked = _MaskedLogits(hidden, weight, temperature, untruncated, _row_of_id(offsets, len(ids)), ids)
        for part, bound in zip(ctx.parts, ctx.bounds, strict=True):
            z = masked.logits(part, bound)
            lse[part] = z.logsumexp(-1)
            z_target[part] = z.gather(1, targets[part, None])[:, 0]
            probs = torch.exp(z - lse[part, None])
            entropy[part] = lse[part] - (probs * z.masked_fill_(probs == 0, 0)).sum(-1)  # outside the set 0 * -inf is 0
        _check_found(z_target)
        ctx.save_for_backward(*masked, targets, lse)
        ctx.mark_non_differentiable(entropy)
        return z_target - lse, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved, targets, lse = ctx.saved_tensors
        masked = _MaskedLogits(*saved)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(masked.hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(masked.weight, dtype=lse.dtype) if wants_weight else None
        scale = grads[0] / masked.temperature
        for part, bound in zip(ctx.parts, ctx.bounds, strict=True):
            dz = masked.logits(part, bound).sub_(lse[part, None]).exp_().neg_()
            dz.scatter_add_(1, targets[part, None], torch.ones_like(dz[:, :1]))
            dz = (dz * scale[part, None]).to(masked.hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = dz @ masked.weight
            if grad_weight is not None:
                grad_weight += _product(dz.T, masked.hidden[part])
        return grad_hidden, _cast(grad_weight, masked.weight), None, None, None, None, None


class _MaskedLogits(NamedTuple):
    """What the logits of any part of the rows are made from."""

    hidden: Tensor
    weight: Tensor
    temperature: Tensor
    untruncated: Tensor
    rows: Tensor  # int64 [M], the row of every kept id
    ids: Tensor

    def logits(self, part: slice, bound: tuple[int, int]) -> Tensor:
        """Logits [n, V] of the rows in `part` over temperature, -inf outside each row's support."""
        z = _product(self.hidden[part], self.weight.T) / self.temperature[part, None]
        begin, end = bound
        dropped = (~self.untruncated[part, None]).repeat(1, len(self.weight))
        dropped[self.rows[begin:end] - part.start, self.ids[begin:end]] = False
        return z.masked_fill_(dropped, -torch.inf)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` with a float32 result for half-precision inputs: rounded logits are what training must not see."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _check_found(z_target: Tensor) -> None:
    missing = int((z_target == -torch.inf).sum())
    if missing:
        raise CorruptRecordError(
            f"corrupt record: {missing} of {len(z_target)} sampled tokens are not in their own kept set; drop these "
            "samples (the engine's recording and its sampler disagree)"
        )


def _parts(length: int, width: int, budget: int) -> Iterator[slice]:
    """Slices of `range(length)` whose `slice x width` elements stay within `budget`."""
    step = max(1, budget // width)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _gather_parts(ids: Tensor, hidden: Tensor) -> Iterator[slice]:
    return _parts(len(ids), hidden.shape[1], GPU_GATHER_BUDGET if hidden.is_cuda else CPU_GATHER_BUDGET)


def _id_bounds(offsets: Tensor, parts: list[slice]) -> list[tuple[int, int]]:
    """Where each part's kept ids begin and end."""
    edges = offsets[[0, *(part.stop for part in parts)]].tolist()
    return list(pairwise(edges))


def _row_of_id(offsets: Tensor, num_ids: int) -> Tensor:
    """The row of every kept id: int64 [M]."""
    return torch.repeat_interleave(offsets.diff(), output_size=num_ids)


def _select_rows(offsets: Tensor, ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The CSR of the rows where `chosen` is True."""
    sizes = offsets.diff()
    picked = sizes[chosen]
    return torch.cat([offsets[:1], picked.cumsum(0)]), ids[torch.repeat_interleave(chosen, sizes, output_size=len(ids))]


def _cast(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(like.dtype)
