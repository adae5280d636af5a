"""1 for the reference answer, 0 for anything else."""

from __future__ import annotations

import re

from rewards.types import Answer
from rollout.types import Task


def exact_match(task: Task, answer: Answer, *, extract: str | None = None) -> float:
    """Compares the completion with `task.answer`, both stripped of surrounding white space.

    Args:
        extract: a regular expression; its last match in the completion (group 1 if it has groups) is what is compared.
            No match scores 0.

    Raises:
        ValueError: the task has no answer to compare with.
    """
    if task.answer is None:
        raise ValueError(f"task {task.id} has no answer: set tasks.answer_key to the column with the reference answer")
    text = answer.text if extract is None else _last_match(extract, answer.text)
    return float(text is not None and text.strip() == task.answer.strip())


def _last_match(pattern: str, text: str) -> str | None:
    matches = list(re.finditer(pattern, text))
    return matches[-1].group(1 if matches[-1].re.groups else 0) if matches else None
