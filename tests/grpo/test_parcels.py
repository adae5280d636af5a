"""Parcels: what comes out is what went in, bit for bit, and little is sent."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from grpo.advantage import Segment
from grpo.batch import MicroBatch
from grpo.cluster.parcels import CompletionParcel, MicroBatchParcel, RecordParcel, ReplayRef
from rollout.types import Completion, FinishReason, KeptSets, Replay
from tests.samples import make_samples

ROUTES = (3, 2, 8)
NUM_PROMPT = 5


def make_completion(seed: int, num_tokens: int, *, truncated: bool = True) -> Completion:
    rng = np.random.default_rng(seed)
    token_ids = rng.integers(0, 90, num_tokens).astype(np.int32)
    extra = rng.integers(0, 4, num_tokens)
    rows = [np.sort(np.array([token, *range(90, 90 + n)], np.int32)) for token, n in zip(token_ids, extra, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(extra + 1)]).astype(np.int64)
    kept = KeptSets(offsets, np.concatenate([np.empty(0, np.int32), *rows]))
    routes = rng.integers(0, 8, (NUM_PROMPT + num_tokens - 1, 3, 2)).astype(np.uint8)
    return Completion(
        token_ids,
        rng.standard_normal(num_tokens).astype(np.float32),
        rng.integers(0, 9, num_tokens).astype(np.int32),
        FinishReason.STOP if num_tokens else FinishReason.ABORT,
        seed,
        Replay(kept if truncated else None, routes if num_tokens else None),
    )


def through_a_process(value):
    """As another process gets it: (the same value, how many arrays were sent)."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(body, buffers=[bytes(buffer) for buffer in buffers]), len(buffers)


def same(one: np.ndarray | None, two: np.ndarray | None) -> bool:
    if one is None or two is None:
        return one is two
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()


def same_record(one: Replay, two: Replay) -> bool:
    if one.kept is None or two.kept is None:
        kept = one.kept is two.kept
    else:
        kept = same(one.kept.offsets, two.kept.offsets) and same(one.kept.ids, two.kept.ids)
    return kept and same(one.routed_experts, two.routed_experts)


@pytest.fixture
def completions() -> Sequence[Completion]:
    """Long, short, of no token, not truncated."""
    return (
        make_completion(0, 40),
        make_completion(1, 1),
        make_completion(2, 0),
        make_completion(3, 9, truncated=False),
    )


def test_completions_come_out_as_they_went_in(completions: Sequence[Completion]) -> None:
    parcel, num_arrays = through_a_process(CompletionParcel.of(completions, NUM_PROMPT))
    assert num_arrays == 3
    for number, (before, after) in enumerate(zip(completions, parcel.open("ref"), strict=True)):
        for name in ("token_ids", "behavior_logprobs", "policy_versions"):
            assert same(getattr(before, name), getattr(after, name)), (number, name)
        assert (after.finish_reason, after.seed) == (before.finish_reason, before.seed)
        assert after.replay == ReplayRef("ref", number)
        assert after.record_error == before.find_record_error(NUM_PROMPT)
    assert parcel.open("ref")[2].record_error == "no token was sampled"


def test_a_corrupt_record_is_named_where_it_was_recorded(completions: Sequence[Completion]) -> None:
    first = completions[0]
    elsewhere = replace(first, token_ids=first.token_ids[::-1] + np.int32(1))
    opened = CompletionParcel.of((first, elsewhere), NUM_PROMPT).open("ref")
    assert [completion.record_error for completion in opened] == ["", "a sampled token lies outside its kept set"]


def test_routes_in_common_are_counted_beside_the_records() -> None:
    first = make_completion(0, 4)
    routes = np.array(first.replay.routed_experts)
    routes[3, 0, 0] += 1
    other = replace(first, replay=Replay(first.replay.kept, routes))
    opened = CompletionParcel.of((first, other), NUM_PROMPT).open("ref")
    assert [completion.common_routes for completion in opened] == [NUM_PROMPT, 3]


def test_records_come_out_as_they_went_in(completions: Sequence[Completion]) -> None:
    records = [completion.replay for completion in completions]
    parcel, num_arrays = through_a_process(RecordParcel.of(records))
    assert num_arrays == 2 + 3  # the sets of all, and the routes of each that has any
    assert all(same_record(one, two) for one, two in zip(records, parcel.open(), strict=True))


def test_micro_batches_come_out_with_the_records_behind_their_handles() -> None:
    samples = list(make_samples(3, num_groups=3, routes=ROUTES))
    two_segments = (*samples[0].segments, replace(samples[1].segments[0], num_shareable=2))
    samples[0] = replace(samples[0], segments=two_segments)
    records: dict[ReplayRef, Replay] = {}

    def with_handle(segment: Segment) -> Segment:
        handle = ReplayRef(f"request {len(records) // 2}", len(records) % 2)
        records[handle] = segment.replay
        return replace(segment, replay=handle)

    sent = tuple(replace(s, segments=tuple(map(with_handle, s.segments))) for s in samples)
    weights = tuple(1.0 / (1 + i) for i in range(len(samples)))
    parcel, num_arrays = through_a_process(MicroBatchParcel.of(MicroBatch(sent, weights)))
    assert num_arrays == 4
    assert parcel.record_refs == [f"request {i}" for i in range((len(records) + 1) // 2)]
    opened = parcel.open(records.__getitem__)
    assert opened.token_weights == weights
    for before, after in zip(samples, opened.samples, strict=True):
        assert replace(after, segments=()) == replace(before, segments=())
        for one, two in zip(before.segments, after.segments, strict=True):
            for name in ("token_ids", "loss_mask", "behavior_logprobs", "policy_versions"):
                assert same(getattr(one, name), getattr(two, name)), name
            assert one.replay is two.replay and one.num_shareable == two.num_shareable


def test_a_micro_batch_may_be_empty() -> None:
    parcel, _ = through_a_process(MicroBatchParcel.of(MicroBatch((), ())))
    assert parcel.record_refs == [] and parcel.open({}.__getitem__) == MicroBatch((), ())
