"""Packed batches built by hand, by plain loops, for tests of the model and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from grpo.batch import TrainBatch


@dataclass(frozen=True)
class HandSequence:
    """One sample of one segment."""

    token_ids: list[int]
    num_prompt: int
    supports: list[list[int]]
    """Per sampled token; an empty one = untruncated."""
    routed_experts: np.ndarray | None = None  # int16 [T, L, K]
    behavior_logprobs: list[float] | None = None
    advantage: float = 1.0
    temperature: float = 1.0
    beta: float = 0.0
    delta: float = float("inf")
    eps_low: float = 0.2
    eps_high: float = 0.2

    @property
    def sampled(self) -> list[int]:
        return self.token_ids[self.num_prompt :]


def pack_by_hand(sequences: Sequence[HandSequence], *, unbiased_kl: bool = True) -> TrainBatch:
    """Loss weights are those of the paper's mean: 1 / (number of samples * |o_i|)."""
    start, rows, cu_seqlens, sample_ids, supports = 0, [], [0], [], []
    for index, s in enumerate(sequences):
        rows += [start + s.num_prompt - 1 + t for t in range(len(s.sampled))]
        sample_ids += [index] * len(s.sampled)
        supports += s.supports
        start += len(s.token_ids)
        cu_seqlens.append(start)
    routes = [s.routed_experts for s in sequences if s.routed_experts is not None]
    behavior = [value for s in sequences for value in (s.behavior_logprobs or [0.0] * len(s.sampled))]

    def per_sample(name: str) -> Tensor:
        return torch.tensor([getattr(s, name) for s in sequences])

    return TrainBatch(
        token_ids=torch.tensor([token for s in sequences for token in s.token_ids]),
        position_ids=torch.tensor([p for s in sequences for p in range(len(s.token_ids))]),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        max_seqlen=max(len(s.token_ids) for s in sequences),
        routed_experts=torch.from_numpy(np.concatenate(routes)) if routes else None,
        rows=torch.tensor(rows),
        targets=torch.tensor([token for s in sequences for token in s.sampled]),
        kept_offsets=torch.tensor([0, *np.cumsum([len(x) for x in supports])]),
        kept_ids=torch.tensor([token for x in supports for token in x], dtype=torch.int64),
        untruncated=torch.tensor([not x for x in supports]),
        temperature=per_sample("temperature")[torch.tensor(sample_ids)],
        behavior_logprobs=torch.tensor(behavior),
        policy_versions=torch.zeros(len(rows), dtype=torch.int32),
        sample_ids=torch.tensor(sample_ids),
        loss_weights=torch.tensor([1 / len(sequences) / len(s.sampled) for s in sequences for _ in s.sampled]),
        advantages=per_sample("advantage"),
        beta=per_sample("beta"),
        delta=per_sample("delta"),
        eps_low=per_sample("eps_low"),
        eps_high=per_sample("eps_high"),
        domains=("test",) * len(sequences),
        unbiased_kl=unbiased_kl,
        needs_reference=any(s.beta > 0 for s in sequences),
    )


def random_sequences(
    lengths: Sequence[tuple[int, int]], *, vocab_size: int, seed: int = 0, routes: tuple[int, int, int] | None = None
) -> list[HandSequence]:
    """Sequences of (prompt, sampled) lengths with random supports, a fifth of them untruncated.

    `routes` = (layers, experts, slots) adds random routing, unknown (-1) on each last token and on one more.
    """
    rng = np.random.default_rng(seed)
    sequences = []
    for num_prompt, num_sampled in lengths:
        token_ids = rng.integers(3, vocab_size, num_prompt + num_sampled).tolist()
        supports = [_support(rng, vocab_size, token) for token in token_ids[num_prompt:]]
        sequences.append(HandSequence(token_ids, num_prompt, supports, temperature=float(rng.uniform(0.6, 1.4))))
        if routes is not None:
            layers, experts, slots = routes
            ids = rng.random((len(token_ids), layers, experts)).argsort(-1)[..., :slots].astype(np.int16)
            ids[-1] = ids[0] = -1
            sequences[-1] = replace(sequences[-1], routed_experts=ids)
    return sequences


def _support(rng: np.random.Generator, vocab_size: int, token: int) -> list[int]:
    if rng.random() < 0.2:
        return []
    others = rng.choice(vocab_size, rng.integers(0, 12), replace=False).tolist()
    return sorted({token, *others})
