"""The shipped numeric reward."""

from __future__ import annotations

import pytest

from rewards.numeric import numeric
from tests.rewards.cases import said, task


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("42", 1.0),
        ("it is 41, no, 42.", 1.0),
        ("42 then 41", 0.0),
        (r"\boxed{42} after 3 steps", 1.0),
        ("#### 42\nchecked 7 times", 1.0),
        ("about $42.00", 1.0),
        ("-42", 0.0),
        ("50-42", 1.0),
        ("<think>42</think> none", 0.0),
        ("", 0.0),
        ("4.2e1", 1.0),
        ("42.1", 0.0),
    ],
)
def test_final_number(text: str, reward: float) -> None:
    assert numeric(task("42"), said(text)) == reward


def test_tolerances() -> None:
    assert numeric(task("100"), said("100.5"), absolute=0.5) == 1.0
    assert numeric(task("100"), said("100.6"), absolute=0.5) == 0.0
    assert numeric(task("1000"), said("1009"), relative=0.01) == 1.0
    assert numeric(task("1000"), said("1011"), relative=0.01) == 0.0


def test_thousands_and_marked_references() -> None:
    assert numeric(task("so 3 * 5 = 15 #### 1,234,567"), said("1234567 apples")) == 1.0
    assert numeric(task("-3"), said("it is \N{MINUS SIGN}3")) == 1.0


def test_anywhere_can_be_switched_off() -> None:
    assert numeric(task("42"), said("it is 42"), anywhere=False) == 0.0


@pytest.mark.parametrize("answer", [None, "", "none"])
def test_reference_without_a_number_is_an_error(answer: str | None) -> None:
    with pytest.raises(ValueError, match="holds no number"):
        numeric(task(answer), said("1"))
