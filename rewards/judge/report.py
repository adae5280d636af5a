"""How far a judge agrees with itself and with given labels.

All measures are taken on scores in [0, 1] (each criterion's scale normalised), per criterion id and for the total.
With x_ur the r-th score of item u, and m_u scores per item:

- exact: mean over items of the share of its pairs of repeats that are equal;
- difference: mean over items of the mean |x_ur - x_us| over its pairs;
- alpha: Krippendorff's alpha with the interval metric, 1 - D_o / D_e,
  D_o = (1/n) sum_u (1/(m_u - 1)) sum_{r != s} (x_ur - x_us)^2, D_e = (1/(n(n-1))) sum over all ordered pairs
  (Krippendorff, Content Analysis, 2004, chapter 11). Undefined where all scores are equal.

Against labels y_u stand the first verdicts x_u:

- accuracy: share of items with x_u = y_u; for the total, with both on the same side of `PASS`;
- error: mean |x_u - y_u|;
- spearman: Pearson's correlation of ranks, ties given their mean rank;
- kappa: Cohen's kappa with squared weights, 1 - sum_u (x_u - y_u)^2 / ((1/n) sum_u sum_v (x_u - y_v)^2).
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rewards.judge.client import Judge
from rewards.judge.schema import Rubric, RubricError, Scores, read_rubric
from rewards.rubric_judge import score
from rewards.types import Abstain, Answer
from rollout.types import FinishReason, Task

PASS = 0.5
"""Totals and labels of at least this much count as a pass."""
TOTAL = "total"


@dataclass(frozen=True, slots=True)
class Item:
    """A completion to judge, with the labels that somebody gave it, if any."""

    task: Task
    answer: Answer
    labels: Mapping[str, float]
    """In [0, 1], by criterion id, and `total`."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """One row: a criterion, or the total. NaN where a measure is not defined or there is nothing to measure."""

    items: int
    """Items with at least two verdicts."""
    exact: float
    difference: float
    alpha: float
    labelled: int
    """Items with a label and a verdict."""
    accuracy: float
    error: float
    spearman: float
    kappa: float


@dataclass(frozen=True, slots=True)
class AgreementReport:
    """What a judge did with a file of completions."""

    rows: Mapping[str, Agreement]
    judgements: int
    abstentions: Mapping[str, int]
    """By reason."""
    manipulation: float
    """Share of the verdicts that flag the answer."""

    def to_json(self) -> dict[str, Any]:
        """JSON values, null for NaN."""
        return {
            "judgements": self.judgements,
            "abstentions": dict(self.abstentions),
            "manipulation": _or_none(self.manipulation),
            "rows": {name: {k: _or_none(v) for k, v in asdict(row).items()} for name, row in self.rows.items()},
        }


Verdict = Scores | Abstain


def read_items(tasks: Sequence[Task]) -> list[Item]:
    """Items of tasks whose row has `completion`, and `label` or `labels` where it is labelled.

    Raises:
        RubricError: no completion, a rubric or a label that cannot be used; names the row.
    """
    return [_read_item(task) for task in tasks]


def _read_item(task: Task) -> Item:
    rubric, completion = read_rubric(task), task.fields.get("completion")
    if not isinstance(completion, str):
        raise RubricError(f'task {task.id}: column "completion" is {completion!r}: want the text to judge')
    given = task.fields.get("labels")
    if given is not None and not isinstance(given, Mapping):
        raise RubricError(f'task {task.id}: column "labels" is {given!r}: want scores by criterion id')
    labels = {name: _read_label(task, rubric, name, value) for name, value in (given or {}).items()}
    if task.fields.get("label") is not None:
        labels[TOTAL] = _number(task, "label", task.fields["label"], 0.0, 1.0)
    elif given and set(given) == {criterion.id for criterion in rubric.criteria}:
        labels[TOTAL] = rubric.total(labels)
    # Its token count is not known here, and judges do not look at it.
    return Item(task, Answer(completion, 0, FinishReason.STOP), labels)


def _read_label(task: Task, rubric: Rubric, name: str, value: object) -> float:
    criterion = next((c for c in rubric.criteria if c.id == name), None)
    if criterion is None:
        raise RubricError(f"task {task.id}: labels.{name}: its rubric has no criterion of that id")
    return criterion.normalise(_number(task, f"labels.{name}", value, *criterion.scale))


def _number(task: Task, where: str, value: object, low: float, high: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise RubricError(f"task {task.id}: {where} is {value!r}: want a number from {low:g} to {high:g}")
    return float(value)


async def judge_items(items: Sequence[Item], judge: Judge, *, repeats: int) -> list[list[Verdict]]:
    """Every item judged `repeats` times, past the cache, repeat r with the seed `sampling.seed + r`.

    Raises:
        JudgeError: the endpoint is not there, or refuses a request.
    """
    access = judge.access.model_copy(update={"cache": ""})
    seeds = [judge.sampling.seed + repeat for repeat in range(repeats)]
    samplings = [judge.sampling.model_copy(update={"seed": seed}) for seed in seeds]
    judges = [Judge(judge.endpoint, judge.model, sampling, access) for sampling in samplings]
    flat = await asyncio.gather(*(_verdict(item, one) for item in items for one in judges))
    return [flat[i : i + repeats] for i in range(0, len(flat), repeats)]


async def _verdict(item: Item, judge: Judge) -> Verdict:
    try:
        return await score(item.task, item.answer, judge)
    except Abstain as abstention:
        return abstention


def measure(items: Sequence[Item], verdicts: Sequence[Sequence[Verdict]]) -> AgreementReport:
    """The report on `verdicts[u][r]`, the r-th verdict on item u."""
    flat = list(itertools.chain.from_iterable(verdicts))
    scores = [[verdict for verdict in row if isinstance(verdict, Scores)] for row in verdicts]
    names = dict.fromkeys(name for row in scores for verdict in row for name in verdict.normalised)
    rows = {name: _row(name, items, scores) for name in (*names, TOTAL)}
    flags = [verdict.manipulation for verdict in flat if isinstance(verdict, Scores)]
    abstentions = Counter(str(verdict) for verdict in flat if isinstance(verdict, Abstain))
    return AgreementReport(rows, len(flat), dict(abstentions), _mean([float(flag) for flag in flags]))


def _row(name: str, items: Sequence[Item], scores: Sequence[Sequence[Scores]]) -> Agreement:
    values = [[v.total if name == TOTAL else v.normalised[name] for v in row if _has(v, name)] for row in scores]
    repeated = [row for row in values if len(row) > 1]
    labelled = [(row[0], item) for row, item in zip(values, items, strict=True) if row and name in item.labels]
    judged = np.array([value for value, _ in labelled], np.float64)
    given = np.array([item.labels[name] for _, item in labelled], np.float64)
    same = (judged >= PASS) == (given >= PASS) if name == TOTAL else np.isclose(judged, given)
    return Agreement(
        items=len(repeated),
        exact=_mean([_over_pairs(row, math.isclose) for row in repeated]),
        difference=_mean([_over_pairs(row, lambda a, b: abs(a - b)) for row in repeated]),
        alpha=krippendorff_alpha(repeated),
        labelled=len(labelled),
        accuracy=_mean(same),
        error=_mean(np.abs(judged - given)),
        spearman=spearman(judged, given),
        kappa=weighted_kappa(judged, given),
    )


def _has(verdict: Scores, name: str) -> bool:
    return name == TOTAL or name in verdict.normalised


def _over_pairs(row: Sequence[float], measure_pair: Any) -> float:
    return _mean([float(measure_pair(a, b)) for a, b in itertools.combinations(row, 2)])


def krippendorff_alpha(units: Sequence[Sequence[float]]) -> float:
    """Krippendorff's alpha, interval metric; units may have different numbers of values, at least two each.

    NaN where it is not defined: fewer than two values, or no variation at all.
    """
    values = np.concatenate([np.asarray(unit, np.float64) for unit in units]) if units else np.empty(0)
    expected = _squared_differences(values) / (len(values) - 1) if len(values) > 1 else 0.0
    if math.isclose(expected, 0.0, abs_tol=1e-12):
        return math.nan
    observed = sum(_squared_differences(np.asarray(unit, np.float64)) / (len(unit) - 1) for unit in units)
    return float(1.0 - observed / expected)


def _squared_differences(values: np.ndarray) -> float:
    """Sum over all ordered pairs of (x_i - x_j)^2, which is 2 n sum_i (x_i - mean)^2."""
    return float(2 * len(values) * ((values - values.mean()) ** 2).sum())


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two float [n]; NaN where one of them does not vary."""
    ranks = np.stack([_ranks(first), _ranks(second)])
    if len(first) < 2 or (np.ptp(ranks, axis=1) == 0).any():
        return math.nan
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values given their mean rank; float64 [n]."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[group]


def weighted_kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Cohen's kappa with squared weights of two float [n]; NaN where chance alone would agree fully."""
    if len(first) == 0:
        return math.nan
    by_chance = float(((first[:, None] - second[None, :]) ** 2).sum()) / len(first)
    return math.nan if by_chance == 0 else 1.0 - float(((first - second) ** 2).sum()) / by_chance


def render(report: AgreementReport) -> str:
    """A table for people."""
    columns = list(Agreement.__dataclass_fields__)
    lines = [["", *columns]]
    lines += [[name, *(_cell(getattr(row, column)) for column in columns)] for name, row in report.rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    abstained = sum(report.abstentions.values())
    table.append(f"judgements {report.judgements}, abstentions {abstained}, flagged {_cell(report.manipulation)}")
    return "\n".join([*table, *(f"  {count} x {reason}" for reason, count in report.abstentions.items())])


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else "-" if math.isnan(value) else f"{value:.3f}"


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
