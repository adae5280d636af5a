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


def supervised_sample(index: int, prompt: np.ndarray, completion: np.ndarray) -> TrainSample:
    """A completion to imitate: int32 [P] and [T] token ids; the whole vocabulary is its support, the model routes by
    itself."""
    token_ids = np.concatenate([prompt, completion]).astype(np.int32)
    loss_mask = np.arange(len(token_ids)) >= len(prompt)
    segment = Segment(
        token_ids=token_ids,
        loss_mask=loss_mask,
        behavior_logprobs=np.zeros(len(token_ids), np.float32),
        policy_versions=np.where(loss_mask, 0, -1).astype(np.int32),
        replay=Replay(kept=None, routed_experts=None),
    )
    return TrainSample(index, 0, "sft", 0.0, _OBJECTIVE, (segment,))


def fine_tune(learner: Learner, batches: Iterable[Sequence[tuple[np.ndarray, np.ndarray]]]) -> list[float]:
    """One optimizer step per batch of (prompt, completion) token ids; returns the mean loss per token of each, in
    nats."""
    losses = []
    for pairs in batches:
        samples = [supervised_sample(i, prompt, completion) for i, (prompt, completion) in enumerate(pairs)]
        max_tokens = learner.spec.config.max_tokens_per_microbatch
        (update,) = plan_updates(samples, max_tokens=max_tokens, aggregation="token")
        result = learner.train([[pack(microbatch) for microbatch in update.ranks[0]]], sft_loss)
        losses.append(result.losses[0])
    return losses
