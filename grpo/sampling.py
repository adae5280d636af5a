"""A task in, its scored group out: the request its domain asks for, drawn on the cluster, scored when complete."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from grpo.config import TrainConfig
from grpo.preflight import Preflight
from rewards.load import RewardSpec
from rewards.score import RewardRunner, Scorer
from rewards.types import ScoredGroup
from rollout.tasks import sample_seed
from rollout.types import Completion, GenerateRequest, Group, Task


class SamplingCluster(RewardRunner, Protocol):
    """What sampling needs of a cluster: completions, and reward functions run on them."""

    async def generate(self, request: GenerateRequest, what: str) -> tuple[Completion, ...]: ...

    def use_rewards(self, rewards: Sequence[RewardSpec]) -> None: ...


@dataclass(frozen=True, slots=True)
class DrawnGroup:
    """A scored group and when its last token and its last reward were there, on `time.perf_counter`."""

    scored: ScoredGroup
    generated_at: float
    scored_at: float


class GroupSampler:
    """Draws groups of completions for tasks."""

    def __init__(self, config: TrainConfig, preflight: Preflight, cluster: SamplingCluster) -> None:
        self._config, self._preflight, self._cluster = config, preflight, cluster
        rewards = preflight.rewards
        cluster.use_rewards([reward.spec for of_domain in rewards.values() for reward in of_domain])
        self._scorer = Scorer(lambda domain: rewards[domain], decode=preflight.tokenizer.decode, runner=cluster)

    async def draw(self, index: int, task: Task, *, num_samples: int, seed: int, greedy: bool = False) -> DrawnGroup:
        """`num_samples` completions of one task, scored.

        `greedy` takes the most likely token at every position instead of sampling.
        """
        prompt = self._preflight.tokenizer.encode(task)
        seeds = tuple(sample_seed(seed, index, i) for i in range(num_samples))
        request = self._request(prompt, task.domain, seeds, greedy)
        completions = await self._cluster.generate(request, f"{num_samples} completions of task {task.id}")
        generated_at = time.perf_counter()
        scored = await self._scorer.score(Group(index, task, prompt, completions))
        return DrawnGroup(scored, generated_at, time.perf_counter())

    def _request(self, prompt: np.ndarray, domain: str, seeds: tuple[int, ...], greedy: bool) -> GenerateRequest:
        sampling = self._config.sampling_of(domain)
        stops: Mapping[str, tuple[int, ...]] = self._preflight.stop_token_ids
        return GenerateRequest(
            prompt_token_ids=prompt,
            seeds=seeds,
            # The engine refuses temperature 0; the most likely id alone is the same choice.
            temperature=1.0 if greedy else sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=1 if greedy else sampling.top_k,
            max_new_tokens=sampling.max_new_tokens,
            stop_token_ids=stops[domain],
        )
