"""The gathered path of `keep_sampling_mask` on a GPU: Triton kernels, forward and backward.

What comes in: rows of the head's input, the head, and CSR sets of kept ids. What goes out: log-probabilities and
entropies over the sets, and counts of the rows this path must not answer for. Rows without a set and rows wider than
the caller's bound get 0 here and count as dense; the caller has another path for them.

The head's gradient is summed in a fixed order, so two runs give the same bits: (id, row) pairs are sorted by id once,
while the caller already reads the counts; one program walks a fixed number of sorted pairs and writes each id's sum
once. Ids whose pairs cross a program's border leave partial sums, which a second kernel adds in order. A set of one id
has log-probability 0 and no gradient: its rows of the head and of the input are never read.

`support_softmax` and `support_logit_grad` are the same two steps on dense logits, for the other path.

All sums are float32. Shapes: N = rows, M = kept ids in all (CSR), d = hidden width, V = vocabulary.
"""

# Triton comes with CUDA builds of torch only; its kernels are launched by subscript.
# pyright: reportMissingImports=false, reportIndexIssue=false

# Launches and the kernel language are not typed for checkers.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from stability.kept_kernels import (
    check_kernel,
    forward_kernel,
    hidden_grad_kernel,
    join_kernel,
    order_kernel,
    support_logit_grad_kernel,
    support_softmax_kernel,
    weight_grad_kernel,
)


class Tile(NamedTuple):
    """How much of a gather one program holds at once; the values below were the best of a sweep on an H100."""

    rows: int
    """Gathered rows."""
    width: int
    """Elements of each."""
    warps: int


FORWARD = Tile(rows=4, width=1024, warps=4)
HIDDEN_GRAD = Tile(rows=2, width=512, warps=1)
WEIGHT_GRAD = Tile(rows=4, width=256, warps=1)  # the kernel spells out its four rows
JOIN = Tile(rows=8, width=512, warps=4)
CHECK_ROWS, CHECK_IDS = 16, 32
ORDER_BLOCK = 1024
DENSE_BLOCK, DENSE_WARPS = 4096, 8
MIN_PAIRS, MAX_PAIRS = 64, 256
"""Sorted pairs one program of the weight gradient walks: few give balance, many give fewer partial sums to store."""


class Sets(NamedTuple):
    """What is asked of each row, fields as in `keep_sampling_mask.support_logprobs`."""

    offsets: Tensor  # int64 [N + 1]
    ids: Tensor  # int32 or int64 [M]
    untruncated: Tensor  # bool [N]
    targets: Tensor  # int64 [N]
    temperature: Tensor  # float32 [N]
    widest: int  # larger sets are not gathered


class Counts:
    """What the check counts, read without waiting for the work queued behind it."""

    def __init__(self, device: torch.device) -> None:
        self.on_device = torch.zeros(3, dtype=torch.int32, device=device)  # missing targets, dense rows, sorted pairs
        self._on_host = self.on_device
        self._arrived: torch.cuda.Event | None = None

    def send(self) -> None:
        """Starts the copy to the host."""
        if self.on_device.is_cuda:
            self._on_host = self.on_device.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> tuple[int, int]:
        """Rows whose target is not in their set, and rows left to the dense path."""
        if self._arrived is not None:
            self._arrived.synchronize()
        num_missing, num_dense, _ = self._on_host.tolist()
        return num_missing, num_dense


class SortedPairs(NamedTuple):
    """The (id, row) pairs that carry a gradient, sorted by id and then row; pairs without one stand at the end."""

    keys: Tensor  # int32 [M], ids or NO_KEY
    rows: Tensor  # int32 [M]
    slots: Tensor  # int32 [M], where the pair of each kept id went


def set_logprobs(
    hidden: Tensor, weight: Tensor, sets: Sets, weight_grad_accumulator: Tensor | None = None
) -> tuple[Tensor, Tensor, Counts]:
    """Log-probability of each row's target over its set, and the entropy over it, reading only rows of kept ids.

    Args:
        hidden: bfloat16, float16 or float32 [N, d].
        weight: bfloat16, float16 or float32 [V, d].
        sets: the rows' supports.
        weight_grad_accumulator: float32 [V, d]; if given, backward adds the weight's gradient to its touched rows and
            gives autograd none, so nothing of the weight's size is written.

    Returns:
        logprobs float32 [N] with gradients to `hidden` and `weight`, entropy float32 [N] in nats without, and the
        counts. The log-probability of a target outside its set means nothing; that of a dense row is 0.
    """
    counts = Counts(hidden.device)
    logprobs, entropy = _SetLogprobs.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, weight, sets, weight_grad_accumulator, counts, torch.is_grad_enabled()
    )
    return logprobs, entropy, counts


def support_softmax(
    logits: Tensor, offsets: Tensor, ids: Tensor, untruncated: Tensor, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Target's logit over temperature (-inf outside its support), log-sum-exp and entropy, each float32 [n].

    `logits` is contiguous float32 [n, V]; the rest is as in `keep_sampling_mask.support_logprobs`.
    """
    z_target, lse, entropy = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    rows = (offsets, ids, untruncated, targets, temperature)
    with torch.cuda.device_of(logits):
        support_softmax_kernel[(len(logits),)](
            logits, *rows, z_target, lse, entropy, logits.shape[1], BLOCK=DENSE_BLOCK, num_warps=DENSE_WARPS
        )
    return z_target, lse, entropy


def support_logit_grad(logits: Tensor, *rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the logits, `dtype` [n, V]; `rows` are those of `support_softmax`, its log-sum-exp, and the gradient
    of the target's log-probability."""
    dz = torch.empty_like(logits, dtype=dtype)
    support_logit_grad_kernel[(len(logits),)](
        logits, *rows, dz, logits.shape[1], BLOCK=DENSE_BLOCK, num_warps=DENSE_WARPS
    )
    return dz


class _SetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        sets: Sets,
        accumulator: Tensor | None,
        counts: Counts,
        recording: bool,
    ) -> tuple[Tensor, Tensor]:
        hidden, weight = _contiguous_rows(hidden), _contiguous_rows(weight)
        ctx.wants_hidden = ctx.needs_input_grad[0]
        ctx.wants_weight = ctx.needs_input_grad[1] or accumulator is not None
        sorting = recording and ctx.wants_weight and len(sets.ids) > 0
        with torch.cuda.device_of(hidden):
            unsorted = _check(sets, counts, list_pairs=sorting)
            logprobs, entropy, lse, z = _forward(hidden, weight, sets, save=recording)
            pairs = _sort_pairs(*unsorted, counts.on_device) if sorting else None
        ctx.save_for_backward(hidden, weight, z, lse)
        ctx.sets, ctx.pairs, ctx.counts, ctx.accumulator = sets, pairs, counts.on_device, accumulator
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, z, lse = ctx.saved_tensors
        grad_hidden, dz = _hidden_grad(hidden, weight, ctx, z, lse, grads[0].contiguous())
        grad_weight = None
        if ctx.wants_weight:
            grad_weight = torch.zeros_like(weight) if ctx.accumulator is None else ctx.accumulator
            if ctx.pairs is not None:
                _add_weight_grad(hidden, ctx.pairs, dz, ctx.counts, grad_weight, add=ctx.accumulator is not None)
        return grad_hidden, grad_weight if ctx.accumulator is None else None, None, None, None, None


def _check(sets: Sets, counts: Counts, *, list_pairs: bool) -> tuple[Tensor, Tensor]:
    """Counts what needs no logits, and lists key and row of every kept id, int32 [M] each, if asked to."""
    keys, rows = torch.empty(2, len(sets.ids) if list_pairs else 0, dtype=torch.int32, device=sets.ids.device)
    num_rows = len(sets.targets)
    if num_rows:
        check_kernel[(triton.cdiv(num_rows, CHECK_ROWS),)](
            *sets[:4],
            keys,
            rows,
            counts.on_device,
            sets.widest,
            num_rows,
            PAIRS=list_pairs,
            ROWS_BLOCK=CHECK_ROWS,
            IDS_BLOCK=CHECK_IDS,
        )
    counts.send()
    return keys, rows


def _forward(hidden: Tensor, weight: Tensor, sets: Sets, *, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, entropy and log-sum-exp, float32 [N] each, and z, float32 [M], empty unless `save`."""
    num_rows, width = hidden.shape
    logprobs, entropy, lse = torch.empty(3, num_rows, dtype=torch.float32, device=hidden.device)
    z = torch.empty(len(sets.ids) if save else 0, dtype=torch.float32, device=hidden.device)
    if num_rows:
        forward_kernel[(num_rows,)](
            hidden,
            weight,
            sets.offsets,
            sets.ids,
            sets.targets,
            sets.temperature,
            logprobs,
            entropy,
            lse,
            z,
            hidden.stride(0),
            weight.stride(0),
            sets.widest,
            WIDTH=width,
            SAVE=save,
            IDS_BLOCK=FORWARD.rows,
            WIDTH_BLOCK=_block(width, FORWARD),
            num_warps=FORWARD.warps,
        )
    return logprobs, entropy, lse, z


def _sort_pairs(keys: Tensor, rows: Tensor, counts: Tensor) -> SortedPairs:
    num_ids = len(keys)
    assert num_ids < 2**31 - MAX_PAIRS, num_ids
    sorted_keys, order = torch.sort(keys, stable=True)
    pairs = SortedPairs(sorted_keys, torch.empty_like(rows), torch.empty_like(rows))
    order_kernel[(triton.cdiv(num_ids, ORDER_BLOCK),)](
        sorted_keys, order, rows, pairs.rows, pairs.slots, counts, num_ids, BLOCK=ORDER_BLOCK
    )
    return pairs


def _hidden_grad(
    hidden: Tensor, weight: Tensor, ctx: Any, z: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Gradient [N, d] of `hidden`, and the gradient of every kept logit, float32 [M] in sorted order."""
    (num_rows, width), sets, pairs = hidden.shape, ctx.sets, ctx.pairs
    grad_hidden = torch.empty_like(hidden) if ctx.wants_hidden else None
    dz = torch.empty_like(z)
    block = _block(width, HIDDEN_GRAD)
    if num_rows:
        hidden_grad_kernel[(num_rows, triton.cdiv(width, block) if ctx.wants_hidden else 1)](
            weight,
            sets.offsets,
            sets.ids,
            sets.targets,
            sets.temperature,
            z,
            lse,
            grad,
            z if pairs is None else pairs.slots,
            dz if grad_hidden is None else grad_hidden,
            dz,
            weight.stride(0),
            sets.widest,
            WIDTH=width,
            HIDDEN=ctx.wants_hidden,
            PAIRS=pairs is not None,
            IDS_BLOCK=HIDDEN_GRAD.rows,
            WIDTH_BLOCK=block,
            num_warps=HIDDEN_GRAD.warps,
        )
    return grad_hidden, dz


def _add_weight_grad(
    hidden: Tensor, pairs: SortedPairs, dz: Tensor, counts: Tensor, grad_weight: Tensor, *, add: bool
) -> None:
    """Writes, or adds, the gradient of the head's touched rows."""
    num_ids, width = len(pairs.keys), hidden.shape[1]
    per_block = min(max(MIN_PAIRS, triton.next_power_of_2(num_ids // 8192)), MAX_PAIRS)
    num_blocks = triton.cdiv(num_ids, per_block)
    partials = torch.empty(num_blocks, 2, width, dtype=torch.float32, device=hidden.device)
    block = _block(width, WEIGHT_GRAD)
    shared = (grad_weight, partials, grad_weight.stride(0), per_block)
    weight_grad_kernel[(num_blocks, triton.cdiv(width, block))](
        hidden,
        pairs.keys,
        pairs.rows,
        dz,
        counts,
        *shared,
        hidden.stride(0),
        WIDTH=width,
        ADD=add,
        WIDTH_BLOCK=block,
        num_warps=WEIGHT_GRAD.warps,
    )
    block = _block(width, JOIN)
    join_kernel[(num_blocks, triton.cdiv(width, block))](
        pairs.keys, *shared, num_ids, WIDTH=width, ADD=add, PARTS=JOIN.rows, WIDTH_BLOCK=block, num_warps=JOIN.warps
    )


def _block(width: int, tile: Tile) -> int:
    return min(tile.width, triton.next_power_of_2(width))


def _contiguous_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
