"""Log-probabilities over the supports that sampling kept (Keep Sampling Mask, arXiv 2512.02556, section 3.1).

With z = W h / temperature at a sampled token and S its recorded support,

    log pi^S(o) = z_o - log sum_{v in S} exp(z_v),        H = -sum_{v in S} pi^S(v) log pi^S(v).

Only the rows of W that belong to some S are read: the cost follows the kept ids, not the vocabulary. Rows without
truncation, rows with very wide sets, and small vocabularies take a dense path that holds a bounded number of logits
and computes them again in the backward pass. On a GPU both paths run through `kept_triton`, except for float64.

Shapes: N = sampled tokens, M = kept ids in all (CSR), d = hidden width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
GPU_DENSE_BUDGET = 2**28
"""The same on a GPU: every part reads and writes the weight's whole gradient, so there should be few."""


class CorruptRecordError(ValueError):
    """A sampled token that is not in its own recorded support: the record is wrong and must not be trained on."""


class _Supports(NamedTuple):
    """What is asked of each row, fields as in `support_logprobs`."""

    offsets: Tensor
    ids: Tensor
    untruncated: Tensor
    targets: Tensor
    temperature: Tensor

    def select(self, chosen: Tensor, rows: Tensor) -> _Supports:
        """The rows where `chosen` is True, whose indices are `rows`."""
        sizes = self.offsets.diff()
        offsets = torch.cat([self.offsets[:1] * 0, sizes[rows].cumsum(0)])
        ids = self.ids[torch.repeat_interleave(chosen, sizes, output_size=len(self.ids))]
        return _Supports(offsets, ids, self.untruncated[rows], self.targets[rows], self.temperature[rows])

    def part(self, rows: slice) -> _Supports:
        """A run of rows; its offsets still count from the first row's."""
        offsets = self.offsets[rows.start : rows.stop + 1]
        return _Supports(offsets, self.ids, self.untruncated[rows], self.targets[rows], self.temperature[rows])


def support_logprobs(  # noqa: PLR0913  the head, the rows and what is asked of them
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    ids: Tensor,
    untruncated: Tensor,
    targets: Tensor,
    temperature: Tensor,
    *,
    weight_grad_accumulator: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target over its support, and the entropy over it.

    Args:
        hidden: float [N, d], the head's input at the sampled tokens.
        weight: float [V, d], the head.
        offsets: int64 [N + 1], CSR rows of the supports; an untruncated row is empty.
        ids: int64 or int32 [M], kept token ids, each once per row.
        untruncated: bool [N], True where the support is the whole vocabulary.
        targets: int64 [N], the sampled tokens.
        temperature: float32 [N].
        weight_grad_accumulator: float32 [V, d] (float64 for float64 inputs). If given, backward adds the weight's
            gradient to it and hands autograd none: only rows of kept ids are touched, unless some row is dense.

    Returns:
        logprobs [N] with gradients to `hidden` and `weight`, entropy [N] in nats without; float32, or float64 for
        float64 inputs. The same inputs give the same bits, gradients included (on a GPU not for float64).

    Raises:
        CorruptRecordError: a target is outside its support.
        ValueError: `weight_grad_accumulator` has another shape or type than it must.
    """
    _check_accumulator(weight_grad_accumulator, weight)
    supports = _Supports(offsets, ids, untruncated, targets, temperature)
    if len(weight) <= SMALL_VOCABULARY:
        return _dense_logprobs(hidden, weight, supports, weight_grad_accumulator)
    if _has_kernels(hidden, weight):
        return _gpu_logprobs(hidden, weight, supports, weight_grad_accumulator)
    dense = untruncated | (offsets.diff() > WIDE_SET)
    num_dense = int(dense.sum())
    if num_dense == 0:
        return kept_logprobs(hidden, weight, offsets, ids, targets, temperature, weight_grad_accumulator)
    if num_dense == len(targets):
        return _dense_logprobs(hidden, weight, supports, weight_grad_accumulator)
    dense_rows, kept_rows = dense.nonzero()[:, 0], (~dense).nonzero()[:, 0]
    kept = supports.select(~dense, kept_rows)
    from_dense = _dense_logprobs(
        hidden[dense_rows], weight, supports.select(dense, dense_rows), weight_grad_accumulator
    )
    from_kept = kept_logprobs(
        hidden[kept_rows], weight, kept.offsets, kept.ids, kept.targets, kept.temperature, weight_grad_accumulator
    )
    order = torch.cat([dense_rows, kept_rows]).argsort()
    logprobs, entropy = (torch.cat(parts)[order] for parts in zip(from_dense, from_kept, strict=True))
    return logprobs, entropy


def kept_logprobs(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    ids: Tensor,
    targets: Tensor,
    temperature: Tensor,
    weight_grad_accumulator: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`support_logprobs` in plain torch for rows that all have a recorded set, reading only the rows of `weight` named
    in `ids`.

    Sums run in float32 (float64 for float64 inputs) whatever the inputs' type; one float per kept id is saved for
    backward.
    """
    return _KeptLogprobs.apply(  # pyright: ignore[reportReturnType]
        hidden, weight, offsets, ids, targets, temperature, weight_grad_accumulator
    )


def _dense_logprobs(
    hidden: Tensor, weight: Tensor, supports: _Supports, accumulator: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`support_logprobs` by the dense path."""
    return _DenseLogprobs.apply(hidden, weight, supports, accumulator)  # pyright: ignore[reportReturnType]


def _gpu_logprobs(
    hidden: Tensor, weight: Tensor, supports: _Supports, accumulator: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All rows through the gathering kernels, which pass over the dense ones; those then take the dense path.

    The host waits for the device once, or twice if there are dense rows.
    """
    from stability import kept_triton  # Triton comes with CUDA builds of torch only

    logprobs, entropy, counts = kept_triton.set_logprobs(
        hidden, weight, kept_triton.Sets(*supports, widest=WIDE_SET), accumulator
    )
    num_missing, num_dense = counts.read()
    _raise_if_missing(num_missing, len(logprobs))
    if num_dense == 0:
        return logprobs, entropy
    if num_dense == len(logprobs):
        return _dense_logprobs(hidden, weight, supports, accumulator)
    dense = supports.untruncated | (supports.offsets.diff() > WIDE_SET)
    rows = dense.nonzero()[:, 0]
    from_dense = _dense_logprobs(hidden[rows], weight, supports.select(dense, rows), accumulator)
    return logprobs.index_copy(0, rows, from_dense[0]), entropy.index_copy(0, rows, from_dense[1])


class _KeptLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913  autograd takes no containers of tensors
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        offsets: Tensor,
        ids: Tensor,
        targets: Tensor,
        temperature: Tensor,
        accumulator: Tensor | None,
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
        _raise_if_missing(int((z_target == -torch.inf).sum()), len(z_target))
        highest = lowest.scatter_reduce(0, rows, z, "amax")
        lse = highest + z.new_zeros(len(targets)).index_add_(0, rows, torch.exp(z - highest[rows])).log()
        probs = torch.exp(z - lse[rows])
        entropy = lse - z.new_zeros(len(targets)).index_add_(0, rows, probs * z)
        ctx.save_for_backward(hidden, weight, ids, rows, probs, is_target, temperature)
        ctx.accumulator = accumulator
        ctx.mark_non_differentiable(entropy)
        return z_target - lse, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, rows, probs, is_target, temperature = ctx.saved_tensors
        dz = (is_target.to(probs.dtype) - probs) * (grads[0] / temperature)[rows]
        grad_hidden = torch.zeros_like(hidden, dtype=probs.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_grad_buffer(ctx, weight, probs.dtype)
        for part in _gather_parts(ids, hidden):
            if grad_hidden is not None:
                grad_hidden.index_add_(0, rows[part], weight[ids[part]].to(probs.dtype) * dz[part, None])
            if grad_weight is not None:
                grad_weight.index_add_(0, ids[part], hidden[rows[part]].to(probs.dtype) * dz[part, None])
        return _cast(grad_hidden, hidden), _weight_grad(ctx, grad_weight, weight), *[None] * 5


class _DenseLogprobs(torch.autograd.Function):
    """All logits of a few rows at a time, computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, supports: _Supports, accumulator: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        softmax, _ = _dense_steps(hidden, weight)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        z_target, lse, entropy = torch.empty(3, len(hidden), dtype=dtype, device=hidden.device)
        for part in _dense_parts(hidden, weight):
            logits = _product(hidden[part], weight.T)
            z_target[part], lse[part], entropy[part] = softmax(logits, *supports.part(part))
        _raise_if_missing(int((z_target == -torch.inf).sum()), len(z_target))
        ctx.save_for_backward(hidden, weight, lse)
        ctx.supports, ctx.accumulator = supports, accumulator
        ctx.mark_non_differentiable(entropy)
        return z_target - lse, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, lse = ctx.saved_tensors
        _, logit_grad = _dense_steps(hidden, weight)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_grad_buffer(ctx, weight, lse.dtype)
        for part in _dense_parts(hidden, weight):
            logits = _product(hidden[part], weight.T)
            dz = logit_grad(logits, *ctx.supports.part(part), lse[part], grads[0][part], dtype=hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = dz @ weight.to(dz.dtype)
            if grad_weight is not None:
                _add_product(grad_weight, dz.T, hidden[part])
        return grad_hidden, _weight_grad(ctx, grad_weight, weight), None, None


def _dense_steps(hidden: Tensor, weight: Tensor) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """What turns a part's logits into softmax numbers and into their own gradient."""
    if _has_kernels(hidden, weight):
        from stability import kept_triton

        return kept_triton.support_softmax, kept_triton.support_logit_grad
    return _support_softmax, _support_logit_grad


def _support_softmax(logits: Tensor, *supports: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Target's logit over temperature, -inf outside the support; log-sum-exp; entropy: each [n]."""
    z = _masked_logits(logits, *supports)
    lse = z.logsumexp(-1)
    probs = torch.exp(z - lse[:, None])
    z_target = z.gather(1, supports[3][:, None])[:, 0]
    entropy = lse - (probs * z.masked_fill_(probs == 0, 0)).sum(-1)  # outside the set 0 * -inf is 0
    return z_target, lse, entropy


def _support_logit_grad(logits: Tensor, *rest: Tensor, dtype: torch.dtype) -> Tensor:
    """dz [n, V] = (1[target] - softmax) grad / temperature."""
    *supports, lse, grad = rest
    dz = _masked_logits(logits, *supports).sub_(lse[:, None]).exp_().neg_()
    dz.scatter_add_(1, supports[3][:, None], torch.ones_like(dz[:, :1]))
    return dz.mul_((grad / supports[4])[:, None]).to(dtype)


def _masked_logits(
    logits: Tensor, offsets: Tensor, ids: Tensor, untruncated: Tensor, targets: Tensor, temperature: Tensor
) -> Tensor:
    """Logits [n, V] over temperature, -inf outside each row's support; in place."""
    begin, end = offsets[[0, -1]].tolist()
    dropped = (~untruncated[:, None]).repeat(1, logits.shape[1])
    dropped[_row_of_id(offsets, end - begin), ids[begin:end]] = False
    return logits.div_(temperature[:, None]).masked_fill_(dropped, -torch.inf)


def _has_kernels(hidden: Tensor, weight: Tensor) -> bool:
    return hidden.is_cuda and torch.float64 not in (hidden.dtype, weight.dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` with a float32 result for half-precision inputs: rounded logits are what training must not see."""
    if left.dtype == right.dtype and left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda and left.dtype == right.dtype:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, the product never rounded to half precision."""
    if left.is_cuda and left.dtype not in (torch.float32, torch.float64):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _weight_grad_buffer(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Where backward sums the weight's gradient; None if nobody asks for it."""
    if ctx.accumulator is not None:
        return ctx.accumulator
    return torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None


def _weight_grad(ctx: Any, total: Tensor | None, weight: Tensor) -> Tensor | None:
    """What autograd gets of it."""
    return _cast(total, weight) if ctx.accumulator is None else None


def _check_accumulator(accumulator: Tensor | None, weight: Tensor) -> None:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if accumulator is not None and (accumulator.shape != weight.shape or accumulator.dtype != dtype):
        raise ValueError(
            f"weight_grad_accumulator is {accumulator.dtype} {list(accumulator.shape)}; give a {dtype} tensor of the "
            f"weight's shape {list(weight.shape)}"
        )


def _raise_if_missing(num_missing: int, num_rows: int) -> None:
    if num_missing:
        raise CorruptRecordError(
            f"corrupt record: {num_missing} of {num_rows} sampled tokens are not in their own kept set; drop these "
            "samples (the engine's recording and its sampler disagree)"
        )


def _parts(length: int, width: int, budget: int) -> Iterator[slice]:
    """Slices of `range(length)` whose `slice x width` elements stay within `budget`."""
    step = max(1, budget // width)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _gather_parts(ids: Tensor, hidden: Tensor) -> Iterator[slice]:
    return _parts(len(ids), hidden.shape[1], GPU_GATHER_BUDGET if hidden.is_cuda else CPU_GATHER_BUDGET)


def _dense_parts(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    return _parts(len(hidden), len(weight), GPU_DENSE_BUDGET if hidden.is_cuda else DENSE_BUDGET)


def _row_of_id(offsets: Tensor, num_ids: int) -> Tensor:
    """The row of every kept id: int64 [M]."""
    return torch.repeat_interleave(offsets.diff(), output_size=num_ids)


def _cast(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(like.dtype)
