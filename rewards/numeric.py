"""1 for a number close enough to the reference number, 0 for any other."""

from __future__ import annotations

import math
import re

from rewards.math_answer import last_boxed
from rewards.types import Answer
from rollout.types import Task

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?|[+-]?\.\d+")


def numeric(
    task: Task, answer: Answer, *, absolute: float = 0.0, relative: float = 1e-6, anywhere: bool = True
) -> float:
    """Compares the completion's final number with that of `task.answer`:

        |got - wanted| <= max(absolute, relative * |wanted|)

    The final number is the last one in the last `\\boxed{}`, else after the last `####`, else (with `anywhere`) in the
    text, always after a closing `</think>`. Thousands may be separated by commas; `$` and units do not matter; `3/4` is
    not read as a fraction (see `math_answer`).

    Raises:
        ValueError: the task's answer holds no number.
    """
    wanted = _last_number(_after_mark(task.answer or ""))
    if wanted is None:
        raise ValueError(
            f"task {task.id}: its answer {task.answer!r} holds no number: use another reward for its domain"
        )
    text = answer.text.rpartition("</think>")[2]
    place = last_boxed(text)
    if place is None and "####" in text:
        place = _after_mark(text)
    if place is None and anywhere:
        place = text
    got = _last_number(place or "")
    return float(got is not None and abs(got - wanted) <= max(absolute, relative * abs(wanted)))


def _after_mark(text: str) -> str:
    """The rest of the line after the last `####`, or all of a text without one."""
    _, mark, after = text.rpartition("####")
    return (after.strip().splitlines() or [""])[0] if mark else text


def _last_number(text: str) -> float | None:
    found = None
    for match in _NUMBER.finditer(text.replace("\u2212", "-")):
        found = match
    if found is None:
        return None
    text_before = text[: found.start()]
    number = found[0]
    if number[0] in "+-" and text_before[-1:].isalnum():  # the dash of a range or a difference, not a sign
        number = number[1:]
    value = float(number.replace(",", ""))
    return value if math.isfinite(value) else None
