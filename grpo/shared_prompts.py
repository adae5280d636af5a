"""Which samples of a group can have their prompt computed once: those with the same tokens and, where routes are
recorded, the same routes at every shared position.

An engine that computes a prompt twice may round differently and route a token differently; such samples share only what
comes before. The last token in front of the first sampled one is never shared: every sample has rows of its own for its
log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from grpo.advantage import Segment, TrainSample
from rollout.types import Replay

WORTHWHILE = 64
"""A segment shares a prompt that is at least one such part of it: each of its blocks of queries reads one block of keys
more where its keys are in two places, which takes as long as computing about so many tokens less."""


@dataclass(frozen=True, slots=True)
class SharedPrompt:
    """The first `length` tokens of the first segments of these samples are the same."""

    members: tuple[int, ...]
    """Indices of two or more samples."""
    length: int

    @property
    def num_saved(self) -> int:
        """Tokens that need not be computed again."""
        return max(0, len(self.members) - 1) * self.length


def find_shared_prompts(samples: Sequence[TrainSample]) -> list[SharedPrompt]:
    """What the groups among these samples can share, records compared; a sample is in one of them at most.

    In the order of their contents the samples that share a stretch stand side by side; of all runs of neighbours the
    one that saves most is taken, then the same is done on both sides of it.
    """
    groups: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.group_index, []).append(index)
    lengths = [len(sample.segments[0].token_ids) for sample in samples]
    found: list[SharedPrompt] = []
    for members in groups.values():
        if len(members) > 1:
            contents = {index: _content(samples[index].segments[0]) for index in members}
            order = sorted(members, key=lambda index: (contents[index].tobytes(), index))
            common = [_common_length(contents[a], contents[b]) for a, b in pairwise(order)]
            found += _best_runs(order, common, lengths)
    return found


def num_saved_at_least(samples: Sequence[TrainSample]) -> int:
    """Tokens that `find_shared_prompts` will save among samples of a group, going by `Segment.num_shareable`."""
    segments = [sample.segments[0] for sample in samples]
    lengths = [len(segment.token_ids) for segment in segments]
    saved = 0
    for shared in {segment.num_shareable for segment in segments} if len(segments) > 1 else ():
        able = [i for i, segment in enumerate(segments) if segment.num_shareable >= shared]
        saved = max(saved, SharedPrompt(_worthwhile(able, shared, lengths), shared).num_saved)
    return saved


def common_routes(first: Replay, other: Replay, num_positions: int) -> int:
    """Leading positions, `num_positions` at most, at which two records name the same experts; all without records."""
    one, two = first.routed_experts, other.routed_experts
    if one is None or two is None:
        return num_positions if one is two else 0
    return _common_length(one[:num_positions], two[:num_positions])


def _content(segment: Segment) -> np.ndarray:
    """What must be the same at every position that may be shared: uint8 [positions, bytes]."""
    limit = max(0, int(segment.loss_mask.argmax()) - 1)  # without a sampled token: nothing
    parts = [np.ascontiguousarray(segment.token_ids[:limit], np.int32)[:, None]]
    routes = segment.replay.routed_experts
    if routes is not None:
        parts.append(np.ascontiguousarray(routes[:limit]).reshape(limit, math.prod(routes.shape[1:])))
    return np.concatenate([part.view(np.uint8) for part in parts], axis=1)


def _common_length(one: np.ndarray, two: np.ndarray) -> int:
    """Leading rows that are equal."""
    length = min(len(one), len(two))
    if length == 0 or one.shape[1:] != two.shape[1:]:
        return 0
    differs = (one[:length] != two[:length]).reshape(length, -1).any(1)
    return int(differs.argmax()) if differs.any() else length


def _best_runs(order: Sequence[int], common: Sequence[int], lengths: Sequence[int]) -> list[SharedPrompt]:
    """`common[i]` are the tokens that `order[i]` and `order[i + 1]` share, `lengths` all that each sample has."""
    best, begin, end = SharedPrompt((), 0), 0, 0
    for start in range(len(common)):
        shared = common[start]
        for stop in range(start + 1, len(order)):
            shared = min(shared, common[stop - 1])
            if (stop - start) * shared > best.num_saved:
                run = SharedPrompt(_worthwhile(order[start : stop + 1], shared, lengths), shared)
                if run.num_saved > best.num_saved:
                    best, begin, end = run, start, stop + 1
    if best.num_saved == 0:
        return []
    before = _best_runs(order[:begin], common[: max(0, begin - 1)], lengths)
    return [*before, best, *_best_runs(order[end:], common[end:], lengths)]


def _worthwhile(members: Sequence[int], shared: int, lengths: Sequence[int]) -> tuple[int, ...]:
    return tuple(index for index in members if lengths[index] <= WORTHWHILE * shared)
