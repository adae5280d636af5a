"""Hand-made and random training samples for tests of packing, losses and learners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from grpo.advantage import Objective, Segment, TrainSample
from rollout.types import KeptSets, Replay

OBJECTIVE = Objective(beta=0.01, delta=0.5, eps_low=0.2, eps_high=0.2, temperature=1.0)


def make_segment(
    rng: np.random.Generator,
    *,
    num_prompt: int,
    num_sampled: int,
    vocab: int,
    routes: tuple[int, int, int] | None = None,
) -> Segment:
    """A random segment; `routes` = (layers, top_k, experts) makes up recorded routes of distinct experts."""
    token_ids = rng.integers(0, vocab, num_prompt + num_sampled).astype(np.int32)
    sets = [
        np.unique(np.append(rng.integers(0, vocab, 1 + rng.poisson(5.0)), token)).astype(np.int32)
        for token in token_ids[num_prompt:]
    ]
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sets])]).astype(np.int64)
    recorded = None
    if routes is not None:
        layers, top_k, experts = routes
        scores = rng.random((num_prompt + num_sampled - 1, layers, experts))
        recorded = np.argsort(scores, axis=-1)[..., :top_k].astype(np.uint8)
    loss_mask = np.arange(num_prompt + num_sampled) >= num_prompt
    return Segment(
        token_ids=token_ids,
        loss_mask=loss_mask,
        behavior_logprobs=np.where(loss_mask, -rng.random(len(token_ids)) * 2, 0).astype(np.float32),
        policy_versions=np.where(loss_mask, 0, -1).astype(np.int32),
        replay=Replay(KeptSets(offsets, np.concatenate(sets)), recorded),
    )


def make_samples(
    seed: int,
    *,
    num_groups: int = 3,
    group_size: int = 4,
    vocab: int = 99,
    routes: tuple[int, int, int] | None = None,
    max_sampled: int = 9,
    objective: Objective = OBJECTIVE,
) -> list[TrainSample]:
    """Random groups with advantages that sum to zero in each."""
    rng = np.random.default_rng(seed)
    samples = []
    for group in range(num_groups):
        rewards = rng.random(group_size)
        for index, advantage in enumerate(rewards - rewards.mean()):
            segment = make_segment(
                rng,
                num_prompt=int(rng.integers(1, 8)),
                num_sampled=int(rng.integers(1, max_sampled + 1)),
                vocab=vocab,
                routes=routes,
            )
            samples.append(TrainSample(group, index, "default", float(advantage), objective, (segment,)))
    return samples


def make_group(
    rng: np.random.Generator,
    index: int,
    *,
    num_prompt: int,
    num_sampled: Sequence[int],
    vocab: int = 98,
    routes: tuple[int, int, int] | None = None,
) -> list[TrainSample]:
    """Samples of one prompt, whose recorded routes are the same over it; the planner may count on all of them."""
    samples = []
    for number, length in enumerate(num_sampled):
        segment = make_segment(rng, num_prompt=num_prompt, num_sampled=length, vocab=vocab, routes=routes)
        if number:
            first = samples[0].segments[0]
            segment.token_ids[:num_prompt] = first.token_ids[:num_prompt]
            ours, theirs = segment.replay.routed_experts, first.replay.routed_experts
            if ours is not None and theirs is not None:
                ours[:num_prompt] = theirs[:num_prompt]
        segment = replace(segment, num_shareable=num_prompt - 1)
        advantage = float(rng.normal())
        samples.append(TrainSample(index, number, "default", advantage, OBJECTIVE, (segment,)))
    return samples
