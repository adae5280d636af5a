"""The shipped exact-match reward."""

from __future__ import annotations

import pytest

from rewards.exact_match import exact_match
from rewards.types import Answer
from rollout.types import FinishReason, Task

TASK = Task("t", "math", "6*7=", "42")


def answer(text: str) -> Answer:
    return Answer(text, 1, FinishReason.STOP)


@pytest.mark.parametrize(("text", "reward"), [("42", 1.0), (" 42\n", 1.0), ("42.", 0.0), ("4 2", 0.0), ("", 0.0)])
def test_stripped_text_must_be_equal(text: str, reward: float) -> None:
    assert exact_match(TASK, answer(text)) == reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [("so #### 42", 1.0), ("#### 41, no: #### 42 ", 1.0), ("#### 42, no: #### 41", 0.0), ("42", 0.0)],
)
def test_last_match_of_a_pattern_counts(text: str, reward: float) -> None:
    assert exact_match(TASK, answer(text), extract=r"####\s*([^,#]+)") == reward


def test_pattern_without_a_group_is_compared_whole() -> None:
    assert exact_match(TASK, answer("x = 42!"), extract=r"\d+") == 1.0


def test_task_without_an_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"set tasks\.answer_key"):
        exact_match(Task("t", "math", "?"), answer("42"))
