"""What happened in a step, as the numbers of one row of `metrics.jsonl`. The names are part of Keel's interface."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from grpo.advantage import AdvantageResult
from grpo.cluster import SyncResult
from grpo.learner import StepResult
from grpo.sampling import DrawnGroup
from grpo.stats import StepStats
from rewards.types import ScoredGroup

_LEARNER_MEANS = {
    "kl": "train/kl",
    "entropy": "train/entropy",
    "clipped": "train/clipped",
    "masked": "train/masked_sequences",
}
"""Learner statistics that are reported as plain means, by domain too."""


def rollout_metrics(groups: Sequence[DrawnGroup], batch: AdvantageResult) -> dict[str, float]:
    """Rewards, lengths and what was dropped."""
    metrics = _reward_metrics(groups, "")
    domains = sorted({group.scored.group.task.domain for group in groups})
    if len(domains) > 1:
        for domain in domains:
            part = [group for group in groups if group.scored.group.task.domain == domain]
            metrics |= _reward_metrics(part, f"/{domain}")
    tokens = sum(answer.num_tokens for group in groups for answer in group.scored.answers)
    causes = sum((Counter(group.scored.failures) for group in groups), Counter[str]())
    metrics |= {f"dropped/{cause.replace(': ', '/', 1)}": count for cause, count in causes.items()}
    return metrics | {
        "train/zero_signal_groups": batch.num_zero_signal,
        "train/dropped_samples": batch.num_dropped_samples,
        "train/num_samples": len(batch.samples),
        "rollout/tokens": tokens,
    }


def _reward_metrics(groups: Sequence[DrawnGroup], suffix: str) -> dict[str, float]:
    scored = [group.scored for group in groups]
    rewards = np.concatenate([s.rewards[s.valid] for s in scored])
    answers = [answer for s in scored for answer in s.answers]
    metrics = {
        f"train/reward{suffix}": _mean(rewards),
        f"train/reward_std{suffix}": _mean(np.array([s.rewards[s.valid].std() for s in scored if s.valid.any()])),
        f"train/response_length{suffix}": _mean(np.array([answer.num_tokens for answer in answers])),
        f"train/truncated_share{suffix}": _mean(np.array([answer.finish_reason == "length" for answer in answers])),
    }
    if suffix:
        metrics[f"train/dropped_samples{suffix}"] = sum(_num_dropped(group) for group in scored)
    for name in dict.fromkeys(name for s in scored for name in s.breakdown):
        values = np.concatenate([s.breakdown[name][s.valid] for s in scored if name in s.breakdown])
        metrics[f"reward/{name}{suffix}"] = _mean(values[np.isfinite(values)])  # not every sample has every part
    return metrics


def _num_dropped(scored: ScoredGroup) -> int:
    """Samples without a reward or with a corrupt record, as `assign_advantages` counts them."""
    sound = np.array([not completion.record_error for completion in scored.group.completions])
    return int((~(scored.valid & sound)).sum())


def learner_metrics(results: Sequence[StepResult]) -> dict[str, float]:
    """The objective's quantities over all ranks and updates, and the mismatch of fresh tokens before any update.

    A quantity that no token of the step has (all groups dropped, say) is NaN.
    """
    stats = StepStats()
    for result in results:
        stats.merge(result.stats)
    metrics = {
        "train/loss": _mean(np.sum([result.losses for result in results], axis=0)),
        "train/grad_norm": _mean(np.array(results[0].grad_norms)),
        "train/lr": results[0].lr,
        "train/ratio_mean": stats.mean("ratio"),
        "train/ratio_max": stats.maximum("ratio"),
        "train/drift": stats.mean("drift"),
        "train/staleness_mean": stats.mean("staleness"),
        "train/staleness_max": stats.maximum("staleness"),
        "mismatch/mean_abs": stats.mean("mismatch"),
        "mismatch/p99_abs": stats.mismatch_percentile(99),
        "mismatch/max_abs": stats.maximum("mismatch"),
        "mismatch/route_agreement": stats.mean("route_agreement"),
        "rollout/kept_mean": stats.mean("kept_size"),
        "learner/tokens_per_s": sum(r.num_tokens for r in results) / max(r.time_s for r in results),
        "learner/shared_tokens": _share_not_computed(results),
        "learner/peak_memory_gib": max(r.peak_memory_bytes for r in results) / 2**30,
    }
    metrics |= {key: stats.mean(name) for name, key in _LEARNER_MEANS.items()}
    for name, moments in stats.moments.items():
        base, _, domain = name.partition("/")
        if base in _LEARNER_MEANS and domain:
            metrics[f"{_LEARNER_MEANS[base]}/{domain}"] = moments.mean
    return metrics


def _share_not_computed(results: Sequence[StepResult]) -> float:
    computed, in_all = sum(r.num_tokens for r in results), sum(r.num_sample_tokens for r in results)
    return 1 - computed / in_all if in_all else math.nan


def fresh_mismatch(metrics: Mapping[str, float], sync: SyncResult, *, is_probe_alike: bool) -> dict[str, float]:
    """`mismatch/mean_abs` of a step without fresh tokens (generation ran ahead of them all) is what the probe found.

    Unless the probe is not like the training samples: then the step has none.
    """
    is_missing = math.isnan(metrics["mismatch/mean_abs"])
    return {"mismatch/mean_abs": sync.parity_error} if is_missing and is_probe_alike else {}


def sync_metrics(sync: SyncResult, num_restarts: int) -> Mapping[str, float]:
    """The weight sync, its probe, and how often a worker was lost so far."""
    return {
        "parity/max_mean_abs": sync.parity_error,
        "sync/gib_per_s": sync.num_bytes / sync.sync_s / 2**30,
        "time/sync_s": sync.sync_s,
        "time/probe_s": sync.probe_s,
        "rollout/worker_restarts": num_restarts,
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if np.size(values) else math.nan
