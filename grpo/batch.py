"""Training samples in, packed micro-batches out.

One micro-batch is one row of sequences laid end to end, without padding: attention never crosses a sequence boundary
and log-probabilities are computed only where a token was sampled. A sample is never split over rows. Loss weights are
fixed here over the whole update, so any packing and any number of ranks gives the same gradient.

A prompt that samples of a group share is computed once, where the model allows it: it is a sequence of its own, the
parent of those that go on from it (`grpo.shared_prompts` says which may). Its gradient is then the sum of theirs.

Shapes: T = packed tokens, S = segments, B = samples, N = sampled tokens, L = decoder layers, K = experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from grpo.advantage import Objective, Segment, TrainSample
from grpo.shared_prompts import find_shared_prompts, num_saved_at_least
from rollout.types import KeptSets, Replay

MICROBATCH_COST = 2048
"""What a micro-batch costs beside its tokens (launching kernels, adding to gradients), in tokens."""


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One packed micro-batch.

    Example, two samples (prompt [5, 6] + sampled [7, 1]; prompt [9] + sampled [1]): `token_ids = [5 6 7 1 9 1]`,
    `position_ids = [0 1 2 3 0 1]`, `cu_seqlens = [0 4 6]`, `rows = [1 2 4]`, `targets = [7 1 1]`, `sample_ids = [0 0
    1]`. If both had begun with [5, 6, 3] and that were shared up to [5, 6], the row would be [5 6 | 3 7 1 | 3 1] with
    `position_ids = [0 1 2 3 4 2 3]`, `cu_seqlens = [0 2 5 7]` and `parents = [-1 0 0]`.
    """

    token_ids: Tensor  # int64 [T]
    position_ids: Tensor  # int64 [T], restarting at 0 in every segment
    cu_seqlens: Tensor  # int32 [S + 1], boundaries of the sequences in the row: segments, or parts of them
    max_seqlen: int
    routed_experts: Tensor | None  # int16 [T, L, K], -1 = unknown; None = the policy routes by itself
    rows: Tensor  # int64 [N], packed positions whose next token was sampled
    targets: Tensor  # int64 [N], the sampled tokens
    kept_offsets: Tensor  # int64 [N + 1], rows of the supports; an untruncated row is empty
    kept_ids: Tensor  # int64 [M]
    untruncated: Tensor  # bool [N], True where the support is the whole vocabulary
    temperature: Tensor  # float32 [N]
    behavior_logprobs: Tensor  # float32 [N], log pi_old as the engine returned it
    policy_versions: Tensor  # int32 [N]
    sample_ids: Tensor  # int64 [N], index into the B samples
    loss_weights: Tensor  # float32 [N], already divided by the update's global count
    advantages: Tensor  # float32 [B]
    beta: Tensor  # float32 [B]
    delta: Tensor  # float32 [B], +inf = the sequence mask is off
    eps_low: Tensor  # float32 [B]
    eps_high: Tensor  # float32 [B]
    domains: tuple[str, ...]  # [B]
    unbiased_kl: bool
    needs_reference: bool  # some beta is above 0; decided here, since asking the tensor would wait for the GPU
    parents: Tensor | None = None
    """int32 [S], rising: the sequence that each goes on from, which has no parent, or -1. None: all are whole."""
    num_saved: int = 0
    """Tokens of the samples that are not in the row again, because it has their prompt already."""

    def __post_init__(self) -> None:
        num_rows, num_samples = len(self.rows), len(self.domains)
        per_row = (self.targets, self.untruncated, self.temperature, self.behavior_logprobs, self.policy_versions)
        for tensor in (*per_row, self.sample_ids, self.loss_weights, self.kept_offsets[1:]):
            assert len(tensor) == num_rows, (len(tensor), num_rows)
        for tensor in (self.advantages, self.beta, self.delta, self.eps_low, self.eps_high):
            assert len(tensor) == num_samples, (len(tensor), num_samples)
        assert self.routed_experts is None or len(self.routed_experts) == len(self.token_ids)

    @property
    def num_sample_tokens(self) -> int:
        """Tokens of all samples; `token_ids` has those that are computed."""
        return len(self.token_ids) + self.num_saved

    def to(self, device: torch.device) -> TrainBatch:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if isinstance(v, Tensor)})

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for `torch.save`; `TrainBatch(**d)` reads them back."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples that share one packed row, with the weight of each of their tokens."""

    samples: tuple[TrainSample, ...]
    token_weights: tuple[float, ...]

    @property
    def num_tokens(self) -> int:
        return sum(sample.num_tokens for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step: the micro-batches of every rank, the same number for each (an empty one is a no-op)."""

    ranks: tuple[tuple[MicroBatch, ...], ...]


def plan_updates(
    samples: Sequence[TrainSample],
    *,
    num_updates: int = 1,
    num_ranks: int = 1,
    max_tokens: int,
    aggregation: Literal["sequence", "token"] = "sequence",
    share_prompts: bool = False,
) -> tuple[Update, ...]:
    """Splits a step's samples into optimizer steps of whole groups, and each of those into balanced micro-batches of at
    most `max_tokens` packed tokens.

    `share_prompts` says that samples will be packed so: they then count no more than what `Segment.num_shareable`
    leaves of them, and groups stay together as far as balance allows.

    The weight of a sampled token is 1 / (number of sequences x |o_i|) for `sequence`, 1 / (number of tokens) for
    `token`, counted over the whole update: the sum over all ranks and micro-batches is then the mean the objective asks
    for.
    """
    groups: dict[int, list[TrainSample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_index, []).append(sample)
    parts = np.array_split(np.arange(len(groups)), num_updates)
    ordered = list(groups.values())
    updates = []
    for part in parts:
        members = [ordered[i] for i in part]
        if members:
            bins = _plan_bins(members, num_ranks, max_tokens, share_prompts)
            updates.append(_weigh(bins, num_ranks, aggregation))
    return tuple(updates)


def _weigh(bins: list[list[TrainSample]], num_ranks: int, aggregation: str) -> Update:
    num_samples = sum(len(samples) for samples in bins)
    num_tokens = sum(sample.num_sampled for samples in bins for sample in samples)

    def weight(sample: TrainSample) -> float:
        return 1 / num_tokens if aggregation == "token" else 1 / (num_samples * sample.num_sampled)

    microbatches = [MicroBatch(tuple(samples), tuple(weight(sample) for sample in samples)) for samples in bins]
    return Update(tuple(tuple(microbatches[rank::num_ranks]) for rank in range(num_ranks)))


def _plan_bins(
    groups: Sequence[Sequence[TrainSample]], num_ranks: int, max_tokens: int, share_prompts: bool
) -> list[list[TrainSample]]:
    """Samples of each micro-batch. Of plans with whole groups, halves, quarters .. single samples it is the one whose
    slowest ranks compute least."""
    size = max(len(samples) for samples in groups)
    is_shared = share_prompts and any(sample.segments[0].num_shareable for group in groups for sample in group)
    plans = []
    for num_parts in [2**i for i in range((size - 1).bit_length())] * is_shared + [size]:
        units = [unit for samples in groups for unit in _cut(samples, num_parts, max_tokens)]
        lengths = [_packed_length(unit) for unit in units]
        bins = _balanced_bins(lengths, num_ranks, max_tokens)
        loads = [sum(lengths[i] for i in indices) for indices in bins]
        slowest = [max(loads[i : i + num_ranks]) for i in range(0, len(bins), num_ranks)]  # these run side by side
        plans.append((sum(slowest) + MICROBATCH_COST * len(slowest), bins, units))
    _, bins, units = min(plans, key=lambda plan: plan[0])
    return [[sample for i in indices for sample in units[i]] for indices in bins]


def _cut(samples: Sequence[TrainSample], num_parts: int, max_tokens: int) -> list[list[TrainSample]]:
    """A group in so many parts, or in more where one would not fit a micro-batch."""
    if num_parts >= len(samples):
        return [[sample] for sample in samples]
    ordered = sorted(samples, key=lambda sample: -sample.segments[0].num_shareable)
    parts = np.array_split(np.arange(len(ordered)), num_parts)
    return [unit for part in parts for unit in _fitting([ordered[i] for i in part], max_tokens)]


def _fitting(samples: list[TrainSample], max_tokens: int) -> list[list[TrainSample]]:
    if len(samples) < 2 or _packed_length(samples) <= max_tokens:
        return [samples] * bool(samples)
    half = len(samples) // 2
    return [*_fitting(samples[:half], max_tokens), *_fitting(samples[half:], max_tokens)]


def _packed_length(samples: Sequence[TrainSample]) -> int:
    """Tokens of samples of a group that are packed together, at most."""
    return sum(sample.num_tokens for sample in samples) - num_saved_at_least(samples)


def _balanced_bins(lengths: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[int]]:
    """Fewest bins (a multiple of the ranks) that the longest-first rule fills without passing `max_tokens`."""
    order = np.argsort(lengths, kind="stable")[::-1]
    num_bins = num_ranks * max(1, -(-sum(lengths) // (max_tokens * num_ranks)))
    while True:
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        loads = np.zeros(num_bins, np.int64)
        for i in order:
            lightest = int(loads.argmin())
            bins[lightest].append(int(i))
            loads[lightest] += lengths[i]
        if loads.max() <= max_tokens:
            return bins
        if num_bins > len(lengths) + num_ranks:
            raise ValueError(f"a sample of {max(lengths)} tokens does not fit max_tokens_per_microbatch = {max_tokens}")
        num_bins += num_ranks


def pack(microbatch: MicroBatch, *, share_prompts: bool = False) -> TrainBatch:
    """Lays the segments of a micro-batch end to end. Every `replay` must have been fetched (no handles).

    `share_prompts`: prompts that samples of a group have in common are laid once (`Learner.shares_prompts` says whether
    the model can read such a row).
    """
    if not microbatch.samples:
        return _no_op_batch()
    samples = microbatch.samples
    segments = [segment for sample in samples for segment in sample.segments]
    pieces = _lay_out(samples, share_prompts)
    lengths = np.array([piece.stop - piece.start for piece in pieces])
    begins = np.concatenate([[0], lengths.cumsum()])
    sampled = [np.flatnonzero(segment.loss_mask) for segment in segments]
    sample_ids = np.repeat(np.arange(len(samples)), [sample.num_sampled for sample in samples])
    offsets, ids, untruncated = _pack_kept(segments)
    objectives = [sample.objective for sample in samples]
    kinds = {objective.unbiased_kl for objective in objectives}
    assert len(kinds) == 1, "the KL estimator is one for the whole run"
    per_token = [np.float32(objective.temperature) for objective in objectives]

    def at_sampled(values: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([array[at] for array, at in zip(values, sampled, strict=True)]))

    is_shared = any(piece.parent >= 0 for piece in pieces)
    return TrainBatch(
        token_ids=torch.from_numpy(
            np.concatenate([segments[p.segment].token_ids[p.start : p.stop] for p in pieces]).astype(np.int64)
        ),
        position_ids=torch.from_numpy(np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces])),
        cu_seqlens=torch.from_numpy(begins.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        routed_experts=_pack_routes(segments, pieces),
        rows=torch.from_numpy(_rows(pieces, begins, sampled)),
        targets=at_sampled([segment.token_ids for segment in segments]).long(),
        kept_offsets=torch.from_numpy(offsets),
        kept_ids=torch.from_numpy(ids),
        untruncated=torch.from_numpy(untruncated),
        temperature=torch.from_numpy(np.array(per_token, np.float32)[sample_ids]),
        behavior_logprobs=at_sampled([segment.behavior_logprobs for segment in segments]),
        policy_versions=at_sampled([segment.policy_versions for segment in segments]),
        sample_ids=torch.from_numpy(sample_ids),
        loss_weights=torch.tensor(microbatch.token_weights, dtype=torch.float32)[sample_ids],
        advantages=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32),
        domains=tuple(sample.domain for sample in samples),
        unbiased_kl=kinds.pop(),
        needs_reference=any(objective.beta > 0 for objective in objectives),
        parents=torch.tensor([piece.parent for piece in pieces], dtype=torch.int32) if is_shared else None,
        num_saved=sum(sample.num_tokens for sample in samples) - int(begins[-1]),
        **_pack_knobs(objectives),
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    """A sequence of the row: tokens `start : stop` of a segment, going on from another piece (-1 = from none)."""

    segment: int
    start: int
    stop: int
    parent: int


def _lay_out(samples: Sequence[TrainSample], share_prompts: bool) -> list[_Piece]:
    """The row's sequences: shared prompts, then segments that share nothing, then what goes on from the prompts."""
    lengths = [len(segment.token_ids) for sample in samples for segment in sample.segments]
    first = np.cumsum([0, *(len(sample.segments) for sample in samples)])
    shared = find_shared_prompts(samples) if share_prompts else []
    parent_of = {int(first[member]): parent for parent, s in enumerate(shared) for member in s.members}
    return [
        *(_Piece(int(first[s.members[0]]), 0, s.length, -1) for s in shared),
        *(_Piece(i, 0, length, -1) for i, length in enumerate(lengths) if i not in parent_of),
        *(_Piece(i, shared[parent].length, lengths[i], parent) for i, parent in parent_of.items()),
    ]


def _rows(pieces: Sequence[_Piece], begins: np.ndarray, sampled: Sequence[np.ndarray]) -> np.ndarray:
    """Packed positions in front of each segment's sampled tokens; no two are the same, int64 [N]."""
    origin = {piece.segment: begin - piece.start for piece, begin in zip(pieces, begins, strict=False)}
    return np.concatenate([origin[i] + at - 1 for i, at in enumerate(sampled)])


def _pack_knobs(objectives: Sequence[Objective]) -> dict[str, Tensor]:
    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    return {
        "beta": column([o.beta for o in objectives]),
        "delta": column([float("inf") if o.delta is None else o.delta for o in objectives]),
        "eps_low": column([o.eps_low for o in objectives]),
        "eps_high": column([o.eps_high for o in objectives]),
    }


def _pack_kept(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All supports as one CSR: offsets int64 [N + 1], ids int64 [M], and which rows are untruncated, bool [N]."""
    sizes, ids, untruncated = [], [], []
    for segment in segments:
        kept: KeptSets | None = segment.replay.kept
        num_sampled = segment.num_sampled
        sizes.append(np.zeros(num_sampled, np.int64) if kept is None else np.diff(kept.offsets))
        ids.append(np.empty(0, np.int32) if kept is None else kept.ids)
        untruncated.append(np.full(num_sampled, kept is None))
    offsets = np.concatenate([[0], np.concatenate(sizes).cumsum()]).astype(np.int64)
    return offsets, np.concatenate(ids).astype(np.int64), np.concatenate(untruncated)


def _pack_routes(segments: Sequence[Segment], pieces: Sequence[_Piece]) -> Tensor | None:
    """Recorded routes of every packed token, int16 [T, L, K]; -1 without a record (each last token, at least)."""
    replays: list[Replay] = [segment.replay for segment in segments]
    shapes = {replay.routed_experts.shape[1:] for replay in replays if replay.routed_experts is not None}
    if not shapes:
        return None
    (shape,) = shapes
    routes = np.full((sum(piece.stop - piece.start for piece in pieces), *shape), -1, np.int16)
    begin = 0
    for piece in pieces:
        recorded = replays[piece.segment].routed_experts
        if recorded is not None:
            is_last = piece.stop == len(segments[piece.segment].token_ids)
            known = begin + piece.stop - piece.start - is_last
            routes[begin:known] = recorded[piece.start : piece.stop]
        begin += piece.stop - piece.start
    return torch.from_numpy(routes)


def _no_op_batch() -> TrainBatch:
    """Two tokens of weight zero: a rank with nothing to do must still take part in the others' collectives."""
    objective = Objective(beta=0.0, delta=None, eps_low=0.2, eps_high=0.2, temperature=1.0)
    segment = Segment(
        token_ids=np.zeros(2, np.int32),
        loss_mask=np.array([False, True]),
        behavior_logprobs=np.zeros(2, np.float32),
        policy_versions=np.full(2, -1, np.int32),
        replay=Replay(KeptSets(np.array([0, 1]), np.zeros(1, np.int32)), None),
    )
    return pack(MicroBatch((TrainSample(-1, 0, "", 0.0, objective, (segment,)),), (0.0,)))
