"""From a checked run file to the cluster that runs it: the learner's specification and the parity probe."""

from __future__ import annotations

from grpo.cluster import Cluster
from grpo.config import TrainConfig
from grpo.learner import LearnerSpec
from grpo.parity import ParityProbe, make_probe
from grpo.preflight import Preflight
from rollout.worker import RolloutWorker

_NUM_PROBE_PROMPTS = 4


def make_cluster(
    config: TrainConfig, preflight: Preflight, *, worker_class: type[RolloutWorker] = RolloutWorker
) -> Cluster:
    """The run's cluster, not started yet."""
    return Cluster(config, learner_spec(config, preflight), _probe(config, preflight), worker_class=worker_class)


def learner_spec(config: TrainConfig, preflight: Preflight) -> LearnerSpec:
    """What every learner rank builds itself from."""
    domains = tuple(sorted({task.domain for task in preflight.tasks}))
    return LearnerSpec(
        model_path=preflight.model_path,
        config=config.learner,
        keep_routing=config.stability.keep_routing and preflight.is_moe,
        needs_reference=config.needs_reference,
        engine_dtype=config.rollout.dtype,
        total_updates=config.run.steps * config.grpo.updates_per_batch,
        domains=domains if len(domains) > 1 else (),
        seed=config.run.seed,
    )


def _probe(config: TrainConfig, preflight: Preflight) -> ParityProbe:
    prompts = [preflight.tokenizer.encode(task) for task in preflight.tasks[:_NUM_PROBE_PROMPTS]]
    return make_probe(
        prompts,
        truncated=config.stability.keep_sampling_mask and config.truncates,
        vocab_size=preflight.tokenizer.vocab_size,
        max_new_tokens=min(s.max_new_tokens for s in config.all_sampling),
        max_error=config.max_parity_error,
    )
