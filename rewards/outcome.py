"""What became of one call of a reward function on one sample: a score, or the cause why there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rewards.types import Abstain, RewardResult

ABSTAINED = "abstained"
TIMEOUT = "timeout"
MEMORY = "memory"
FLOODED = "flooded its output"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A score, or a failure with its cause."""

    value: float = math.nan
    parts: Mapping[str, float] = field(default_factory=dict)
    cause: str = ""
    """Empty for a score; else `timeout`, `memory`, `abstained`, `signal SIGSEGV`, `exited with status 3`, an
    exception's name, or what is wrong with the returned value."""
    detail: str = ""
    """A traceback or the last words of the process, for the log."""
    seconds: float = 0.0
    """How long the call took."""
    mutated: bool = False
    """The call changed its task or answer; looked for by `keel check-reward` only."""

    @property
    def ok(self) -> bool:
        return not self.cause


class BadResult(Exception):
    """A reward function returned something that is not a score."""


def read_result(result: object) -> tuple[float, dict[str, float]]:
    """Value and parts of what a per-sample reward returned.

    Raises:
        BadResult: it is not a finite number, a mapping of such numbers, or a `RewardResult`.
        Abstain: it is one.
    """
    if isinstance(result, Abstain):
        raise result
    if isinstance(result, RewardResult):
        return _number(result.value), _parts(result.parts)
    if isinstance(result, Mapping):
        if not result:
            raise BadResult("returned an empty mapping")
        parts = _parts(result)
        return sum(parts.values()), parts
    return _number(result), {}


def read_group(results: object, num_answers: int) -> Sequence[object]:
    """What a per-group reward returned, one entry per answer.

    Raises:
        BadResult: it is not a sequence of that length.
    """
    if not isinstance(results, Sequence | np.ndarray) or isinstance(results, str | bytes):
        raise BadResult(f"returned {type(results).__name__}, not a sequence of results")
    if len(results) != num_answers:
        raise BadResult(f"returned {len(results)} results for {num_answers} answers")
    return list(results)


def _parts(parts: object) -> dict[str, float]:
    if not isinstance(parts, Mapping):
        raise BadResult(f"returned parts of type {type(parts).__name__}, not a mapping")
    return {str(name): _number(value) for name, value in parts.items()}


def _number(value: object) -> float:
    if not isinstance(value, int | float | np.integer | np.floating | np.bool_):
        raise BadResult(f"returned {type(value).__name__}, not a number")
    if not math.isfinite(value):
        raise BadResult("returned a number that is not finite")
    return float(value)
