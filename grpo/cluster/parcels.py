"""Messages of many small arrays, sent as a few long ones: what a message costs goes by the number of its arrays.

A parcel holds what it was made of bit for bit. Opened, its arrays are views of the long ones, and read-only where they
came from another process.

Shapes: T = sampled tokens of a completion, C = those of all completions, S = tokens of all segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo.advantage import Objective, Segment, TrainSample
from grpo.batch import MicroBatch
from grpo.shared_prompts import common_routes
from rollout.types import Completion, FinishReason, KeptSets, Replay


@dataclass(frozen=True, slots=True)
class ReplayRef:
    """A handle to one `Replay` inside the parcel of a request's records."""

    ref: Any  # ray.ObjectRef of a RecordParcel
    index: int


@dataclass(frozen=True, slots=True)
class CompletionParcel:
    """The completions of one request without their records."""

    lengths: tuple[int, ...]
    """T of each."""
    token_ids: np.ndarray  # int32 [C]
    behavior_logprobs: np.ndarray  # float32 [C]
    policy_versions: np.ndarray  # int32 [C]
    others: tuple[tuple[FinishReason, int, str, int], ...]
    """Why each ended, its seed, what is wrong with its record, and its `common_routes`."""

    @classmethod
    def of(cls, completions: Sequence[Completion], num_prompt_tokens: int) -> CompletionParcel:
        """Judges and compares the records as well: this is the last place where both are together."""

        def others(completion: Completion) -> tuple[FinishReason, int, str, int]:
            error = completion.find_record_error(num_prompt_tokens)
            common = common_routes(completions[0].replay, completion.replay, num_prompt_tokens)
            return completion.finish_reason, completion.seed, error, common

        return cls(
            lengths=tuple(c.num_tokens for c in completions),
            token_ids=np.concatenate([c.token_ids for c in completions]),
            behavior_logprobs=np.concatenate([c.behavior_logprobs for c in completions]),
            policy_versions=np.concatenate([c.policy_versions for c in completions]),
            others=tuple(map(others, completions)),
        )

    def open(self, record_ref: Any) -> tuple[Completion, ...]:
        """The completions, each with a handle to its record in the parcel behind `record_ref`."""
        columns = (_cut(a, self.lengths) for a in (self.token_ids, self.behavior_logprobs, self.policy_versions))
        rows = zip(*columns, self.others, strict=True)
        return tuple(
            Completion(token_ids, logprobs, versions, reason, seed, ReplayRef(record_ref, i), error, common)
            for i, (token_ids, logprobs, versions, (reason, seed, error, common)) in enumerate(rows)
        )


@dataclass(frozen=True, slots=True)
class RecordParcel:
    """The records of one request's completions."""

    num_offsets: tuple[int, ...]
    """T + 1 of each; 0 without kept sets."""
    offsets: np.ndarray  # int64
    num_ids: tuple[int, ...]
    ids: np.ndarray  # int32
    routed_experts: tuple[np.ndarray | None, ...]
    """As they are: there are few of them, and they are long."""

    @classmethod
    def of(cls, replays: Sequence[Replay]) -> RecordParcel:
        offsets = [_NO_OFFSETS if replay.kept is None else replay.kept.offsets for replay in replays]
        ids = [_NO_IDS if replay.kept is None else replay.kept.ids for replay in replays]
        routes = tuple(replay.routed_experts for replay in replays)
        return cls(_lengths(offsets), np.concatenate(offsets), _lengths(ids), np.concatenate(ids), routes)

    def open(self) -> list[Replay]:
        """The records in their order."""
        pairs = zip(_cut(self.offsets, self.num_offsets), _cut(self.ids, self.num_ids), strict=True)
        kept = (KeptSets(offsets, ids) if len(offsets) else None for offsets, ids in pairs)
        return [Replay(sets, routes) for sets, routes in zip(kept, self.routed_experts, strict=True)]


@dataclass(frozen=True, slots=True)
class MicroBatchParcel:
    """A micro-batch on its way to the rank that trains on it, with handles in place of records."""

    samples: tuple[tuple[int, int, str, float, Objective, int], ...]
    """The fields of each `TrainSample`, and how many segments it has."""
    token_weights: tuple[float, ...]
    others: tuple[tuple[ReplayRef, int], ...]
    """The handle of each segment, and its `num_shareable`."""
    lengths: tuple[int, ...]
    """Tokens of each segment."""
    token_ids: np.ndarray  # int32 [S]
    loss_mask: np.ndarray  # bool [S]
    behavior_logprobs: np.ndarray  # float32 [S]
    policy_versions: np.ndarray  # int32 [S]

    @classmethod
    def of(cls, microbatch: MicroBatch) -> MicroBatchParcel:
        samples = microbatch.samples
        segments = [segment for sample in samples for segment in sample.segments]
        handles: list[Any] = [segment.replay for segment in segments]

        def joined(dtype: type, array_of: Callable[[Segment], np.ndarray]) -> np.ndarray:
            return np.concatenate([np.empty(0, dtype), *map(array_of, segments)])  # a micro-batch may be empty

        return cls(
            samples=tuple(
                (s.group_index, s.sample_index, s.domain, s.advantage, s.objective, len(s.segments)) for s in samples
            ),
            token_weights=microbatch.token_weights,
            others=tuple((h, segment.num_shareable) for h, segment in zip(handles, segments, strict=True)),
            lengths=tuple(len(segment.token_ids) for segment in segments),
            token_ids=joined(np.int32, lambda segment: segment.token_ids),
            loss_mask=joined(np.bool_, lambda segment: segment.loss_mask),
            behavior_logprobs=joined(np.float32, lambda segment: segment.behavior_logprobs),
            policy_versions=joined(np.int32, lambda segment: segment.policy_versions),
        )

    @property
    def record_refs(self) -> list[Any]:
        """References to the parcels with its records, each once."""
        return list(dict.fromkeys(handle.ref for handle, _ in self.others))

    def open(self, find_record: Callable[[ReplayRef], Replay]) -> MicroBatch:
        """The micro-batch with its records, found by their handles."""
        arrays = (self.token_ids, self.loss_mask, self.behavior_logprobs, self.policy_versions)
        rows = zip(*(_cut(array, self.lengths) for array in arrays), self.others, strict=True)
        segments = iter(
            [
                Segment(token_ids, loss_mask, logprobs, versions, find_record(handle), num_shareable)
                for token_ids, loss_mask, logprobs, versions, (handle, num_shareable) in rows
            ]
        )
        samples = tuple(
            TrainSample(group, index, domain, advantage, objective, tuple(itertools.islice(segments, num_segments)))
            for group, index, domain, advantage, objective, num_segments in self.samples
        )
        return MicroBatch(samples, self.token_weights)


_NO_OFFSETS, _NO_IDS = np.empty(0, np.int64), np.empty(0, np.int32)


def _lengths(arrays: Sequence[np.ndarray]) -> tuple[int, ...]:
    return tuple(len(array) for array in arrays)


def _cut(array: np.ndarray, lengths: Sequence[int]) -> Iterator[np.ndarray]:
    """Consecutive stretches of these lengths; views."""
    ends = itertools.accumulate(lengths, initial=0)
    return (array[start:stop] for start, stop in itertools.pairwise(ends))
