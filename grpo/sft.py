"""Supervised fine-tuning on prompts and completions through the learner's own path: packed rows, same head, another
loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from grpo.advantage import Objective, Segment, TrainSample
from grpo.batch import pack, plan_updates
from grpo.learner import Learner
from grpo.loss import sft_loss
from rollout.types import Replay

_OBJECTIVE = Objective(beta=0.0, delta=None, eps_low=0.2, eps_high=0.2, temperature=1.0)


def supervised_sample(group_index: int, prompt: np.ndarray, completion: np.ndarray) -> TrainSample:
    """A completion to imitate: int32 [P] and [T] token ids; the whole vocabulary is its support, the model routes by
    itself. Samples of a group have the same prompt."""
    token_ids = np.concatenate([prompt, completion]).astype(np.int32)
    loss_mask = np.arange(len(token_ids)) >= len(prompt)
    segment = Segment(
        token_ids=token_ids,
        loss_mask=loss_mask,
        behavior_logprobs=np.zeros(len(token_ids), np.float32),
        policy_versions=np.where(loss_mask, 0, -1).astype(np.int32),
        replay=Replay(kept=None, routed_experts=None),
        num_shareable=max(0, len(prompt) - 1),
    )
    return TrainSample(group_index, 0, "sft", 0.0, _OBJECTIVE, (segment,))


def fine_tune(learner: Learner, batches: Iterable[Sequence[tuple[np.ndarray, np.ndarray]]]) -> list[float]:
    """One optimizer step per batch of (prompt, completion) token ids; returns the mean loss per token of each, in
    nats."""
    losses = []
    for pairs in batches:
        groups: dict[bytes, int] = {}
        numbers = [groups.setdefault(prompt.tobytes(), len(groups)) for prompt, _ in pairs]
        samples = [supervised_sample(i, *pair) for i, pair in zip(numbers, pairs, strict=True)]
        max_tokens, share = learner.spec.config.max_tokens_per_microbatch, learner.shares_prompts
        (update,) = plan_updates(samples, max_tokens=max_tokens, aggregation="token", share_prompts=share)
        packed = [pack(microbatch, share_prompts=share) for microbatch in update.ranks[0]]
        result = learner.train([packed], sft_loss)
        losses.append(result.losses[0])
    return losses
