"""The shipped multiple-choice reward."""

from __future__ import annotations

import pytest

from rewards.choice import choice
from tests.rewards.cases import said, task


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        "(B)",
        "**B**",
        "B. Because it is so",
        "B) four",
        r"\boxed{B}",
        r"\boxed{\text{B}}",
        r"\boxed{b}",
        r"\boxed{(B) four}",
        "The answer is B.",
        "Answer: (B)",
        "**Answer:** **B**",
        "First A, but the correct answer is option B",
        "answer is A. No: the answer is B",
        "<think>the answer is A</think>\nB",
        "A is wrong.\n\nB",
    ],
)
def test_right_letter(text: str) -> None:
    assert choice(task("B"), said(text)) == 1.0


@pytest.mark.parametrize(
    "text",
    ["A", "", "A good question", "Both are fine", "The answer is a bad one", r"\boxed{A}", r"\boxed{BA}", "B or C?",
     "the answer is Better", "<think>B</think>", r"the answer is B \boxed{C}", "The answer is B. No, the answer is C."],
)  # fmt: skip
def test_anything_else(text: str) -> None:
    assert choice(task("B"), said(text)) == 0.0


def test_reference_forms() -> None:
    assert choice(task("(c)"), said("C")) == 1.0
    assert choice(task("2"), said("C")) == 1.0
    assert choice(task("T"), said("The answer is T"), letters="TF") == 1.0


@pytest.mark.parametrize("answer", [None, "", "Z", "four"])
def test_reference_that_is_no_letter_is_an_error(answer: str | None) -> None:
    with pytest.raises(ValueError, match="is none of ABCDEFGHIJ"):
        choice(task(answer), said("B"))
