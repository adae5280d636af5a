"""Rubrics in, JSON schemas out; a judge's reply in, a checked verdict out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from rollout.types import Task

MAX_STEPS = 100
"""Most steps of a scale: every one of them is listed in the JSON schema."""
RESERVED_IDS = frozenset({"manipulation", "position_flips", "longer_won"})
"""Names of parts that are not criteria."""


class RubricError(ValueError):
    """A task whose rubric cannot be used: the message names task and field, and the remedy."""


class Criterion(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """One thing that is graded.

    Example: `{"id": "accuracy", "text": "Every statement is true.", "weight": 2, "scale": [1, 5]}`.
    """

    id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Names the score in the breakdown."""
    text: str = Field(min_length=1)
    """What the judge is told to look at."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Relative share of the total."""
    scale: tuple[int, int] = (1, 5)
    """Worst and best score, both possible, and every whole number between them."""

    @model_validator(mode="after")
    def _check(self) -> Criterion:
        low, high = self.scale
        if not 1 <= high - low <= MAX_STEPS:
            raise ValueError(f"scale {list(self.scale)}: want [worst, best] with at most {MAX_STEPS} steps between")
        if self.id in RESERVED_IDS:
            raise ValueError(f"id {self.id!r} is the name of another part of the breakdown: choose another")
        return self

    def normalise(self, score: float) -> float:
        """A score on this scale, as 0 (worst) to 1 (best)."""
        low, high = self.scale
        return (score - low) / (high - low)


class Rubric(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How answers to one prompt are graded."""

    criteria: tuple[Criterion, ...] = Field(min_length=1)
    reference: str | None = None
    """An answer that is right by assumption; unset: the task's answer, if it has one."""

    @model_validator(mode="after")
    def _check(self) -> Rubric:
        ids = [criterion.id for criterion in self.criteria]
        twice = next((name for name in ids if ids.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two criteria have the id {twice!r}: give each its own")
        return self

    def total(self, normalised: Mapping[str, float]) -> float:
        """The weighted mean sum_c w_c s_c / sum_c w_c of scores in [0, 1], by criterion id; in [0, 1] itself."""
        weights = math.fsum(criterion.weight for criterion in self.criteria)
        return math.fsum(criterion.weight * normalised[criterion.id] for criterion in self.criteria) / weights


def read_rubric(task: Task) -> Rubric:
    """`task.fields["rubric"]`: `{"criteria": [...], "reference": ...}`, or the list of criteria alone.

    Raises:
        RubricError: no rubric, or one that cannot be used.
    """
    data = task.fields.get("rubric")
    if data is None:
        raise RubricError(
            f'task {task.id}: no rubric: give its row a column "rubric" like {{"criteria": [{{"id": "accuracy", '
            '"text": "Every statement is true."}]}'
        )
    if isinstance(data, list | tuple):
        data = {"criteria": data}
    try:
        rubric = Rubric.model_validate(data)
    except ValidationError as error:
        raise RubricError("\n".join(f"task {task.id}: {_explain(problem)}" for problem in error.errors())) from None
    if rubric.reference is None and task.answer is not None:
        return rubric.model_copy(update={"reference": task.answer})
    return rubric


def _explain(problem: Any) -> str:
    field = ".".join(["rubric", *map(str, problem["loc"])])
    if problem["type"] == "extra_forbidden":
        known = Criterion.model_fields if "criteria" in problem["loc"] else Rubric.model_fields
        return f"{field}: unknown key; known keys: {', '.join(known)}"
    given = "" if problem["type"] in ("missing", "value_error") else f" (got {problem['input']!r})"
    return f"{field}: {problem['msg'].removeprefix('Value error, ')}{given}: correct it in the task file"


class BadVerdict(Exception):
    """A judge's reply that is not a verdict on the rubric; says why."""


class Better(StrEnum):
    """What a judge says of two answers, by the order it saw them in."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"


@dataclass(frozen=True, slots=True)
class Scores:
    """A verdict on one answer."""

    raw: Mapping[str, int]
    """By criterion id, on the criterion's own scale."""
    normalised: Mapping[str, float]
    """The same in [0, 1]."""
    manipulation: bool
    """The judge says that the answer tries to influence it."""
    total: float
    """Weighted mean of `normalised`, 0 where `manipulation`."""


@dataclass(frozen=True, slots=True)
class Preferences:
    """A verdict on two answers in one order."""

    better: Mapping[str, Better]  # by criterion id
    manipulation: tuple[bool, bool]  # first, second


def score_schema(rubric: Rubric, rationale_chars: int) -> dict[str, Any]:
    """JSON schema of a verdict on one answer."""
    leaves = {c.id: ("score", {"type": "integer", "enum": list(_steps(c))}) for c in rubric.criteria}
    return _verdict_schema(("manipulation_attempt",), leaves, rationale_chars)


def compare_schema(rubric: Rubric, rationale_chars: int) -> dict[str, Any]:
    """JSON schema of a verdict on two answers."""
    leaves = {c.id: ("better", {"type": "string", "enum": list(Better)}) for c in rubric.criteria}
    return _verdict_schema(("manipulation_first", "manipulation_second"), leaves, rationale_chars)


def _verdict_schema(flags: tuple[str, ...], leaves: Mapping[str, Any], rationale_chars: int) -> dict[str, Any]:
    """The reason comes before the score, so that the score can follow from it."""
    reason: dict[str, Any] = {"type": "string"} | ({"maxLength": rationale_chars} if rationale_chars else {})
    criteria = {name: _object({"rationale": reason, key: leaf}) for name, (key, leaf) in leaves.items()}
    return _object({flag: {"type": "boolean"} for flag in flags} | {"criteria": _object(criteria)})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _steps(criterion: Criterion) -> range:
    return range(criterion.scale[0], criterion.scale[1] + 1)


def read_scores(text: str, rubric: Rubric) -> Scores:
    """A reply to a prompt for scores.

    Raises:
        BadVerdict: not JSON, something missing or of the wrong type, a score off its scale.
    """
    verdict = _read_json(text)
    manipulation = _flag(verdict, "manipulation_attempt")
    raw = {c.id: _read_score(_entry(verdict, c, "score"), c) for c in rubric.criteria}
    normalised = {c.id: c.normalise(raw[c.id]) for c in rubric.criteria}
    return Scores(raw, normalised, manipulation, 0.0 if manipulation else rubric.total(normalised))


def read_preferences(text: str, rubric: Rubric) -> Preferences:
    """A reply to a prompt for a comparison.

    Raises:
        BadVerdict: not JSON, something missing or of the wrong type.
    """
    verdict = _read_json(text)
    flags = (_flag(verdict, "manipulation_first"), _flag(verdict, "manipulation_second"))
    return Preferences({c.id: _read_better(_entry(verdict, c, "better"), c) for c in rubric.criteria}, flags)


def _read_json(text: str) -> Mapping[str, Any]:
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    try:
        verdict = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):  # brackets nested a thousand deep
        raise BadVerdict("the reply is not JSON") from None
    if not isinstance(verdict, Mapping):
        raise BadVerdict(f"the reply is {type(verdict).__name__}, not a JSON object")
    return verdict


def _flag(verdict: Mapping[str, Any], key: str) -> bool:
    value = verdict.get(key)
    if not isinstance(value, bool):
        raise BadVerdict(f"{key} is missing or not true or false")
    return value


def _entry(verdict: Mapping[str, Any], criterion: Criterion, key: str) -> object:
    criteria = verdict.get("criteria")
    entry = criteria.get(criterion.id) if isinstance(criteria, Mapping) else None
    if not isinstance(entry, Mapping) or key not in entry:
        raise BadVerdict(f"criterion {criterion.id}: no {key}")
    return entry[key]


def _read_score(value: object, criterion: Criterion) -> int:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value in _steps(criterion)
    if not whole:
        raise BadVerdict(f"criterion {criterion.id}: the score is off its scale")
    return int(value)  # pyright: ignore[reportArgumentType]


def _read_better(value: object, criterion: Criterion) -> Better:
    if value not in list(Better):
        raise BadVerdict(f"criterion {criterion.id}: better is not first, second or tie")
    return Better(value)
