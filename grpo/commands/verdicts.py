"""A run's metrics in, a handful of one-line judgements out: what a person debugging an RL run asks first.

Each judgement looks at a few metrics and is left out when they are absent. Nothing is hidden by it: the curves are all
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

Rows = Sequence[Mapping[str, Any]]
Tone = Literal["good", "bad", "neutral"]

STAGES = ("generate", "score", "train", "sync", "probe", "eval")
"""The parts of a step, as in `time/<stage>_s`."""
EDGE = 0.1
"""Start and end of a run are means over this share of its steps, so that one lucky batch does not decide."""
MUCH_MASKED = 0.2
"""Above this share of masked sequences most of the negative signal is being thrown away."""
MUCH_WITHOUT_SIGNAL = 0.5
"""Above this share of groups with equal rewards the tasks are too easy or too hard."""
COLLAPSED_ENTROPY = 0.1
"""Entropy below this share of its start: the policy hardly explores any more."""
RATIO_SLACK = 0.05
"""The mean ratio of a sound run is 1 up to sampling noise."""

MUST_BE_FINITE = ("train/reward", "train/loss", "train/grad_norm", "train/kl", "train/ratio_mean", "train/ratio_max")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line of the report's head."""

    label: str
    value: str
    note: str
    tone: Tone


def judge(rows: Rows, config: Mapping[str, Any]) -> list[Verdict]:
    """All judgements that the metrics allow, the most telling first.

    Args:
        rows: rows of `metrics.jsonl` in order.
        config: the resolved configuration, as in `config.json`.
    """
    judges: tuple[Callable[[Rows, Mapping[str, Any]], Verdict | None], ...] = (
        _reward, _accuracy, _not_finite, _mismatch, _parity, _routes, _ratio, _masked, _kl, _entropy,
        _staleness, _signal, _dropped, _restarts, _speed,
    )  # fmt: skip
    return [verdict for judge_one in judges if (verdict := judge_one(rows, config)) is not None]


def series(rows: Rows, key: str) -> list[tuple[int, float]]:
    """Step and value wherever the metric is there and finite."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last tenth, at least one value each."""
    size = max(1, round(len(values) * EDGE))
    return fmean(values[:size]), fmean(values[-size:])


def _values(rows: Rows, key: str) -> list[float]:
    return [value for _, value in series(rows, key)]


def _worst(points: Iterable[tuple[int, float]]) -> tuple[int, float]:
    return max(points, key=lambda point: point[1])


def _reward(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    values = _values(rows, "train/reward")
    if not values:
        return None
    start, end = ends(values)
    tone: Tone = "good" if end > start else "bad"
    return Verdict("Reward", f"{start:.3f} → {end:.3f}", f"over {len(values)} steps, best {max(values):.3f}", tone)


def _accuracy(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    points = series(rows, "eval/accuracy")
    if not points:
        return None
    start, end = points[0][1], points[-1][1]
    step, best = _worst(points)
    tone: Tone = "neutral" if len(points) == 1 else "good" if end > start else "bad"
    return Verdict("Held-out accuracy", f"{start:.1%} → {end:.1%}", f"best {best:.1%} at step {step}", tone)


def _not_finite(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    """Nulls among what every step that trained on something must have; other quantities may have no token."""
    trained = [row for row in rows if row.get("train/num_samples", 1) > 0]
    found = [(row["step"], key) for row in trained for key in MUST_BE_FINITE if key in row and row[key] is None]
    if not found:
        return None
    step, key = found[0]
    return Verdict("Not finite", f"{len(found)} values", f"first {key} at step {step}", "bad")


def _mismatch(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    points = series(rows, "mismatch/mean_abs")
    if not points:
        return None
    step, worst = _worst(points)
    limit = _parity_limit(config)
    return Verdict(
        "Worst mismatch",
        f"{worst:.2e}",
        f"mean |log π - log π_old| of fresh tokens, step {step}",
        "good" if worst <= limit else "bad",
    )


def _parity(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    points = series(rows, "parity/max_mean_abs")
    if not points:
        return None
    step, worst = _worst(points)
    limit = _parity_limit(config)
    tone: Tone = "good" if worst <= limit else "bad"
    return Verdict("Weight sync", f"{worst:.2e}", f"worst probe error after a sync, step {step}; limit {limit:g}", tone)


def _routes(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    values = _values(rows, "mismatch/route_agreement")
    if not values:
        return None
    note = f"of the replayed experts the learner would have chosen itself; lowest {min(values):.2%}"
    return Verdict("Route agreement", f"{fmean(values):.2%}", note, "neutral")


def _ratio(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    points = series(rows, "train/ratio_mean")
    if not points:
        return None
    step, mean = max(points, key=lambda point: abs(point[1] - 1))
    peak = max(_values(rows, "train/ratio_max"), default=None)
    note = f"mean farthest from 1, step {step}" + ("" if peak is None else f"; largest token {peak:.3g}")
    return Verdict("Ratio", f"{mean:.4f}", note, "good" if abs(mean - 1) <= RATIO_SLACK else "bad")


def _masked(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    points = series(rows, "train/masked_sequences")
    if not points:
        return None
    mean, (step, worst) = fmean(value for _, value in points), _worst(points)
    tone: Tone = "bad" if mean > MUCH_MASKED else "good"
    return Verdict("Masked sequences", f"{mean:.2%}", f"mean share; most {worst:.1%} at step {step}", tone)


def _kl(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    values = _values(rows, "train/kl")
    if not values or not any(values):
        return None
    return Verdict(
        "KL to the reference", f"{ends(values)[1]:.3g}", f"nats per token at the end; most {max(values):.3g}", "neutral"
    )


def _entropy(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    values = _values(rows, "train/entropy")
    if not values:
        return None
    start, end = ends(values)
    collapsed = start > 0 and end < COLLAPSED_ENTROPY * start
    note = "collapsed: the policy hardly explores any more" if collapsed else "nats per token over the support"
    return Verdict("Entropy", f"{start:.3f} → {end:.3f}", note, "bad" if collapsed else "neutral")


def _staleness(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    means, peaks = _values(rows, "train/staleness_mean"), _values(rows, "train/staleness_max")
    if not means or not peaks:
        return None
    bound = config["grpo"]["max_off_policy_steps"]
    tone: Tone = "good" if max(peaks) <= bound else "bad"
    return Verdict("Staleness", f"{fmean(means):.2f}", f"policy versions; most {max(peaks):g}, allowed {bound}", tone)


def _signal(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    values = _values(rows, "train/zero_signal_groups")
    if not values:
        return None
    share = fmean(values) / config["grpo"]["prompts_per_step"]
    note = "of the groups had equal rewards and taught nothing"
    return Verdict("Without signal", f"{share:.0%}", note, "bad" if share > MUCH_WITHOUT_SIGNAL else "neutral")


def _dropped(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    values = _values(rows, "train/dropped_samples")
    if not values:
        return None
    total = round(sum(values))
    return Verdict("Dropped samples", f"{total:,}", "without a usable reward or record", "bad" if total else "good")


def _restarts(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    values = _values(rows, "rollout/worker_restarts")
    if not values or not max(values):
        return None
    return Verdict("Lost workers", f"{max(values):g}", "replaced; their unfinished samples were drawn again", "bad")


def _speed(rows: Rows, config: Mapping[str, Any]) -> Verdict | None:
    step_times, speeds = _values(rows, "time/step_s"), _values(rows, "rollout/tokens_per_s")
    if not step_times:
        return None
    totals = {stage: sum(_values(rows, f"time/{stage}_s")) for stage in STAGES}
    slowest = max(totals, key=lambda stage: totals[stage])
    share = totals[slowest] / max(sum(totals.values()), 1e-9)
    note = f"median step; {slowest} takes {share:.0%} of it" + (
        f"; {median(speeds):,.0f} tokens/s drawn" if speeds else ""
    )
    return Verdict("Speed", f"{median(step_times):.2f} s", note, "neutral")


def _parity_limit(config: Mapping[str, Any]) -> float:
    from grpo.config import TrainConfig

    return TrainConfig.model_validate(config).max_parity_error
