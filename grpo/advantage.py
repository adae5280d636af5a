"""Scored groups in, training samples out: the group-mean baseline of GRPO without division by the deviation.

Knows nothing of models or packing. A sample whose reward could not be computed, or whose record is corrupt, has been
taken out of its group before (`ScoredGroup.valid`); groups without signal are returned as dropped, never trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.types import ScoredGroup
from rollout.types import Completion, Group, Replay, ReplayHandle


@dataclass(frozen=True, slots=True)
class Objective:
    """The per-domain knobs one sample is trained with."""

    beta: float
    delta: float | None
    eps_low: float
    eps_high: float
    temperature: float
    unbiased_kl: bool = True


@dataclass(frozen=True, slots=True)
class Segment:
    """One token-exact stretch of context and sampled tokens, seen by the model from position 0.

    Example, prompt [5, 6] and sampled [7, 1]: `token_ids = [5, 6, 7, 1]`, `loss_mask = [F, F, T, T]`. A tool's output
    is context too: it may stand between sampled tokens with `loss_mask` False.
    """

    token_ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T], True where the policy sampled the token
    behavior_logprobs: np.ndarray  # float32 [T], 0 where loss_mask is False
    policy_versions: np.ndarray  # int32 [T], -1 where loss_mask is False
    replay: Replay | ReplayHandle
    """`kept` has one row per sampled token; `routed_experts` one row per token but the last."""
    num_shareable: int = 0
    """Any two samples of a group can share the smaller of their first segments' numbers of leading tokens, at least, if
    they are packed together. For planning: packing itself compares tokens and records."""

    @property
    def num_sampled(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One trajectory with its advantage; its sequence mask and length mean run over all its segments."""

    group_index: int
    sample_index: int
    domain: str
    advantage: float
    objective: Objective
    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens to forward, context included."""
        return sum(len(s.token_ids) for s in self.segments)

    @property
    def num_sampled(self) -> int:
        """|o_i|: sampled tokens, the length the objective divides by."""
        return sum(s.num_sampled for s in self.segments)


@dataclass(frozen=True, slots=True)
class AdvantageResult:
    """What a step can train on, and what it cannot."""

    samples: tuple[TrainSample, ...]
    num_zero_signal: int
    """Groups dropped because all their rewards are equal (or fewer than two are left)."""
    num_dropped_samples: int
    """Samples without a usable reward or record."""


def assign_advantages(groups: Sequence[ScoredGroup], objective_of: Callable[[str], Objective]) -> AdvantageResult:
    """A_i = R_i - mean_j R_j within each group (arXiv 2512.02556, section 3.1: no standard deviation)."""
    samples: list[TrainSample] = []
    num_zero_signal = num_dropped = 0
    for scored in groups:
        sound = np.array([not completion.record_error for completion in scored.group.completions])
        valid = np.flatnonzero(scored.valid & sound)
        num_dropped += len(scored.valid) - len(valid)
        rewards = scored.rewards[valid]
        if len(valid) < 2 or np.all(rewards == rewards[0]):
            num_zero_signal += 1
            continue
        objective = objective_of(scored.group.task.domain)
        for i, advantage in zip(valid, rewards - rewards.mean(), strict=True):
            samples.append(_to_sample(scored.group, int(i), float(advantage), objective))
    return AdvantageResult(tuple(samples), num_zero_signal, num_dropped)


def _to_sample(group: Group, index: int, advantage: float, objective: Objective) -> TrainSample:
    segment = completion_segment(group.prompt_token_ids, group.completions[index])
    return TrainSample(group.index, index, group.task.domain, advantage, objective, (segment,))


def completion_segment(prompt_token_ids: np.ndarray, completion: Completion) -> Segment:
    """A prompt and its completion as one segment."""
    num_prompt = len(prompt_token_ids)
    return Segment(
        token_ids=np.concatenate([prompt_token_ids, completion.token_ids]),
        loss_mask=np.arange(num_prompt + completion.num_tokens) >= num_prompt,
        behavior_logprobs=np.concatenate([np.zeros(num_prompt, np.float32), completion.behavior_logprobs]),
        policy_versions=np.concatenate([np.full(num_prompt, -1, np.int32), completion.policy_versions]),
        replay=completion.replay,
        num_shareable=max(0, min(completion.common_routes, num_prompt - 1)),
    )
