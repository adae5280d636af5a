"""1 for the right letter of a multiple-choice question, 0 for any other."""

from __future__ import annotations

import re

from rewards.math_answer import last_boxed
from rewards.types import Answer
from rollout.types import Task

_TEXT_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_STATED = (
    r"(?i:(?:answer|choice|option)\b(?:\s+(?:is|would\s+be|should\s+be))?[\s:=*_]*(?:(?:option|choice)\s+)?[(\[*_]*)"
    r"({})\b(?!['\u2019])"
)
_ALONE = r"[(\[*_\s]*({})[)\].:*_\s]*"


def choice(task: Task, answer: Answer, *, letters: str = "ABCDEFGHIJ") -> float:
    """Compares the letter that the completion settles on with `task.answer` (`B`, `(B)` or the index 1).

    In this order: the last `\\boxed{B}`; the last "answer is B", "Answer: (B)", "option B"; a last line that is the
    letter alone, or starts with it as `B)` or `B.`. After a closing `</think>`. A letter inside other text does not
    count, so that "A good question" is no answer.

    Args:
        letters: the labels that the questions use, in order.

    Raises:
        ValueError: the task's answer is none of the letters.
    """
    wanted = _wanted(task, letters)
    return float(_chosen(answer.text.rpartition("</think>")[2], letters) == wanted)


def _wanted(task: Task, letters: str) -> str:
    text = (task.answer or "").strip().strip("()[].").strip()
    if text.isdigit() and int(text) < len(letters):
        return letters[int(text)]
    if len(text) != 1 or text.upper() not in letters:
        raise ValueError(
            f"task {task.id}: its answer {task.answer!r} is none of {letters}: set letters or tasks.answer_key"
        )
    return text.upper()


def _chosen(text: str, letters: str) -> str | None:
    one = f"[{re.escape(letters)}{re.escape(letters.lower())}]"
    boxed = last_boxed(text)
    if boxed is not None:
        match = re.match(rf"[(\[*_\s]*({one})(?:[)\].:*_\s]|$)", _TEXT_WRAPPER.sub(r"\1", boxed))
        return match[1].upper() if match else None
    upper = f"[{re.escape(letters)}]"
    stated = re.findall(_STATED.format(upper), text)
    if stated:
        return stated[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    alone = re.fullmatch(_ALONE.format(one), last) or re.match(rf"[(\[*_]*({upper})[*_]*[)\].:]", last)
    return alone[1].upper() if alone else None
