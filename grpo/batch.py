"""Training samples in, packed micro-batches out.

One micro-batch is one row of sequences laid end to end, without padding: attention never crosses a sequence boundary
and log-probabilities are computed only where a token was sampled. A sample is never split. Loss weights are fixed here
over the whole update, so any packing and any number of ranks gives the same gradient.

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
from rollout.types import KeptSets, Replay


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One packed micro-batch.

    Example, two samples (prompt [5, 6] + sampled [7, 1]; prompt [9] + sampled [1]): `token_ids = [5 6 7 1 9 1]`,
    `position_ids = [0 1 2 3 0 1]`, `cu_seqlens = [0 4 6]`, `rows = [1 2 4]`, `targets = [7 1 1]`, `sample_ids = [0 0
    1]`.
    """

    token_ids: Tensor  # int64 [T]
    position_ids: Tensor  # int64 [T], restarting at 0 in every segment
    cu_seqlens: Tensor  # int32 [S + 1], segment boundaries in the row
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

    def __post_init__(self) -> None:
        num_rows, num_samples = len(self.rows), len(self.domains)
        per_row = (self.targets, self.untruncated, self.temperature, self.behavior_logprobs, self.policy_versions)
        for tensor in (*per_row, self.sample_ids, self.loss_weights, self.kept_offsets[1:]):
            assert len(tensor) == num_rows, (len(tensor), num_rows)
        for tensor in (self.advantages, self.beta, self.delta, self.eps_low, self.eps_high):
            assert len(tensor) == num_samples, (len(tensor), num_samples)
        assert self.routed_experts is None or len(self.routed_experts) == len(self.token_ids)

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
) -> tuple[Update, ...]:
    """Splits a step's samples into optimizer steps of whole groups, and each of those into balanced micro-batches.

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
        members = [sample for i in part for sample in ordered[i]]
        if members:
            updates.append(_plan_update(members, num_ranks, max_tokens, aggregation))
    return tuple(updates)


def _plan_update(members: list[TrainSample], num_ranks: int, max_tokens: int, aggregation: str) -> Update:
    num_tokens = sum(sample.num_sampled for sample in members)

    def weight(sample: TrainSample) -> float:
        return 1 / num_tokens if aggregation == "token" else 1 / (len(members) * sample.num_sampled)

    bins = _balanced_bins([sample.num_tokens for sample in members], num_ranks, max_tokens)
    microbatches = [
        MicroBatch(tuple(members[i] for i in indices), tuple(weight(members[i]) for i in indices)) for indices in bins
    ]
    return Update(tuple(tuple(microbatches[rank::num_ranks]) for rank in range(num_ranks)))


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


def pack(microbatch: MicroBatch) -> TrainBatch:
    """Lays the segments of a micro-batch end to end. Every `replay` must have been fetched (no handles)."""
    if not microbatch.samples:
        return _no_op_batch()
    samples = microbatch.samples
    segments = [segment for sample in samples for segment in sample.segments]
    lengths = np.array([len(segment.token_ids) for segment in segments])
    starts = np.concatenate([[0], lengths.cumsum()])
    token_ids = np.concatenate([segment.token_ids for segment in segments]).astype(np.int64)
    loss_mask = np.concatenate([segment.loss_mask for segment in segments])
    sampled_at = np.flatnonzero(loss_mask)
    num_sampled = np.array([sample.num_sampled for sample in samples])
    sample_ids = np.repeat(np.arange(len(samples)), num_sampled)
    offsets, ids, untruncated = _pack_kept(segments)
    objectives = [sample.objective for sample in samples]
    kinds = {objective.unbiased_kl for objective in objectives}
    assert len(kinds) == 1, "the KL estimator is one for the whole run"
    per_token = [np.float32(objective.temperature) for objective in objectives]
    return TrainBatch(
        token_ids=torch.from_numpy(token_ids),
        position_ids=torch.from_numpy(np.arange(len(token_ids)) - np.repeat(starts[:-1], lengths)),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        routed_experts=_pack_routes(segments),
        rows=torch.from_numpy(sampled_at - 1),
        targets=torch.from_numpy(token_ids[sampled_at]),
        kept_offsets=torch.from_numpy(offsets),
        kept_ids=torch.from_numpy(ids),
        untruncated=torch.from_numpy(untruncated),
        temperature=torch.from_numpy(np.array(per_token, np.float32)[sample_ids]),
        behavior_logprobs=torch.from_numpy(np.concatenate([s.behavior_logprobs for s in segments])[sampled_at]),
        policy_versions=torch.from_numpy(np.concatenate([s.policy_versions for s in segments])[sampled_at]),
        sample_ids=torch.from_numpy(sample_ids),
        loss_weights=torch.tensor(microbatch.token_weights, dtype=torch.float32)[sample_ids],
        advantages=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32),
        domains=tuple(sample.domain for sample in samples),
        unbiased_kl=kinds.pop(),
        needs_reference=any(objective.beta > 0 for objective in objectives),
        **_pack_knobs(objectives),
    )


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


def _pack_routes(segments: Sequence[Segment]) -> Tensor | None:
    """Recorded routes of every packed token, int16 [T, L, K]; -1 without a record (each last token, at least)."""
    replays: list[Replay] = [segment.replay for segment in segments]
    shapes = {replay.routed_experts.shape[1:] for replay in replays if replay.routed_experts is not None}
    if not shapes:
        return None
    (shape,) = shapes
    routes = np.full((sum(len(s.token_ids) for s in segments), *shape), -1, np.int16)
    start = 0
    for segment, replay in zip(segments, replays, strict=True):
        if replay.routed_experts is not None:
            routes[start : start + len(segment.token_ids) - 1] = replay.routed_experts
        start += len(segment.token_ids)
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
