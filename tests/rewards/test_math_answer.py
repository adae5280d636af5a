"""Final answers in many writings, and inputs that hang math-verify."""

from __future__ import annotations

import threading
import time

import pytest

from rewards.math_answer import last_boxed, math_answer
from tests.rewards.cases import said, task

SAME = [
    ("42", r"so \boxed{42}"),
    ("42", r"\boxed{7} no, \boxed{42}"),
    (r"\boxed{7}", r"\boxed{7}"),
    ("$7$", r"\boxed{\boxed{7}}"),
    ("1/2", r"\boxed{0.5}"),
    (r"\frac{1}{2}", r"\boxed{\frac12}"),
    (r"1\frac{1}{2}", r"\boxed{1.5}"),
    (r"-\frac{3}{4}", r"\boxed{-0.75}"),
    ("0.333333", r"\boxed{\frac13}"),
    ("1234", r"\boxed{1,234}"),
    ("3.5e3", r"\boxed{3500}"),
    (r"\$18.00", r"\boxed{18}"),
    (r"50\%", r"\boxed{50}"),
    ("0.5", r"\boxed{50\%}"),
    ("12", r"\boxed{12\text{ cm}}"),
    ("12 cm", r"\boxed{12}"),
    (r"90^\circ", r"\boxed{90}"),
    (r"2\sqrt{2}", r"\boxed{\sqrt{8}}"),
    (r"\frac{\sqrt{3}}{3}", r"\boxed{\frac{1}{\sqrt{3}}}"),
    ("2^{100}", r"\boxed{1267650600228229401496703205376}"),
    ("10!", r"\boxed{3628800}"),
    ("3+4i", r"\boxed{4i+3}"),
    (r"\infty", r"\boxed{\infty}"),
    (r"\{1,2,3\}", r"\boxed{\{3,2,1\}}"),
    (r"1+\sqrt{2}, 1-\sqrt{2}", r"\boxed{1-\sqrt{2}, 1+\sqrt2}"),
    ("(1,2)", r"\boxed{(1, 2)}"),
    ("[0,1)", r"\boxed{[0,1)}"),
    (r"[-\frac{1}{2},3)", r"\boxed{\left[-0.5, 3\right)}"),
    ("(1,2)", r"\boxed{(1.0, \frac42)}"),
    (r"\{1,\frac12\}", r"\boxed{\left\{\frac{2}{4}, 1\right\}}"),
    (r"\{1,2.5\}", r"\boxed{\{2.5,1\}}"),
    ("(1,2000)", r"\boxed{(1, 2000)}"),
    (r"(0,1]\cup[2,3)", r"\boxed{(0,1] \cup [2,3)}"),
    (r"x \in [0,1]", r"\boxed{[0,1]}"),
    ("0<x<1", r"\boxed{0 < x < 1}"),
    ("x<3", r"\boxed{3>x}"),
    ("x=5", r"\boxed{5}"),
    ("5", r"\boxed{x=5}"),
    ("y=2x+1", r"\boxed{y = 1 + 2x}"),
    ("2x+y=4", r"\boxed{y=4-2x}"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    (r"\sin^2 x", r"\boxed{1-\cos^2 x}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}"),
    ("yes", r"\boxed{\text{Yes}}"),
    ("Paris", r"\boxed{Paris}"),
    (r"\frac{\pi}{2}", r"The answer is $\pi/2$."),
    ("7", "I think.\n\nThe answer is 7."),
    ("7", "Answer: 7 apples\n\n"),
    ("3", "The final answer is $3$"),
    ("18", "**18**"),
    ("18", "Therefore she makes $18 dollars."),
    ("7", r"<think>\boxed{8}</think> \boxed{7}"),
    ("9^{9^{9}}", r"\boxed{9^{9^{9}}}"),
]
DIFFERENT = [
    ("42", r"\boxed{41}"),
    ("42", "42 is not\n\\boxed{24}"),
    ("42", r"\boxed{42} no, \boxed{7}"),
    ("2^{100}", r"\boxed{1267650600228229401496703205377}"),
    ("0.333", r"\boxed{\frac13}"),
    ("x^2", r"\boxed{x^3}"),
    ("x", r"\boxed{y}"),
    (r"\sqrt{x^2}", r"\boxed{x}"),
    (r"2\sqrt{2}", r"\boxed{\sqrt{7}}"),
    ("[0,1)", r"\boxed{[0,1]}"),
    (r"\{1,2\}", r"\boxed{\{1,2,3\}}"),
    (r"\{1,2\}", r"\boxed{\{1,1,2\}}"),
    (r"\{1,2\}", r"\boxed{\{1,3\}}"),
    ("(1,2)", r"\boxed{(2,1)}"),
    ("(1,2)", r"\boxed{(1,2,2)}"),
    ("(1,2)", r"\boxed{(1,2]}"),
    ("[1,2)", r"\boxed{[1,2.1)}"),
    ("x<3", r"\boxed{x>3}"),
    ("2x+y=4", r"\boxed{y=4+2x}"),
    ("1", r"\boxed{1,2}"),
    ("yes", r"\boxed{no}"),
    ("Paris", r"\boxed{pairs}"),
    ("7", "The answer is 8."),
    ("5", "five"),
    ("7", ""),
    ("7", r"\boxed{}"),
    ("7", r"<think>\boxed{7}</think>"),
    ("7", r"\boxed{7"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\boxed{\begin{pmatrix}1&2\\3&5\end{pmatrix}}"),
    (r"\sqrt{2+\sqrt{3}}+\sqrt[3]{7}", r"\boxed{\sqrt{2+\sqrt{5}}-\sqrt[5]{11}}"),
]
HANGING = [
    "9^{9^{9}}",
    "9^{9^{9^{9}}}",
    "10000000!",
    "(5!)!!",
    r"\prod_{i=1}^{1000000} i",
    r"\sum_{i=1}^{10^9} i",
    r"\binom{10000000}{5000000}",
    "(x+1)^{100000}",
    "(x+1)^{50}(y+2)^{50}(z+3)^{50}",
    "10^{1000000000}",
    "10^{-999999999}",
    r"\sqrt{2^{99999999}}",
    r"\frac{10^{99999999}}{3}",
    r"2^{2^{2^{2^{2^{2}}}}}",
    r"\int_0^1 \sin(x^x) dx",
    r"\lfloor 10^{10^{8}} \rfloor",
    "1e999999999",
    "(" * 200 + "1" + ")" * 200,
    "x^" * 150 + "2",
    r"\frac{1}{" * 15 + "2" + "}" * 15,
    "+".join(rf"\sqrt{{{n}}}" for n in range(2, 40)),
    "1," * 200,
    "1" * 590,
]


@pytest.mark.parametrize(("gold", "text"), SAME)
def test_same(gold: str, text: str) -> None:
    assert math_answer(task(gold), said(text)) == 1.0


@pytest.mark.parametrize(("gold", "text"), DIFFERENT)
def test_different(gold: str, text: str) -> None:
    assert math_answer(task(gold), said(text)) == 0.0


@pytest.mark.parametrize("answer", HANGING)
def test_inputs_that_hang_the_library_are_answered_in_time(answer: str) -> None:
    started = time.monotonic()
    for gold in ("3", "x^2+1", "[0,1]", r"\{1,2\}", "x<3", "x+y=3"):
        assert math_answer(task(gold), said(rf"\boxed{{{answer}}}")) == 0.0
        assert math_answer(task(gold), said(f"The answer is ${answer}$")) == 0.0
    assert time.monotonic() - started < 10


def test_works_outside_the_main_thread() -> None:
    results: list[float] = []
    worker = threading.Thread(target=lambda: results.append(math_answer(task(r"\sqrt{12}"), said(r"\boxed{2\sqrt3}"))))
    worker.start()
    worker.join(30)
    assert results == [1.0]


def test_boxed_only_and_length() -> None:
    assert math_answer(task("7"), said("The answer is 7"), boxed_only=True) == 0.0
    assert math_answer(task("7"), said(r"\boxed{7}"), boxed_only=True) == 1.0
    assert math_answer(task("7"), said(r"\boxed{7.0000000}"), max_chars=5) == 0.0


def test_last_boxed_balances_braces() -> None:
    assert last_boxed(r"a \boxed{1} b \boxed{\frac{1}{2}} c") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1} then \boxed{2") == "1"
    assert last_boxed("none") is None


def test_task_without_an_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"set tasks\.answer_key"):
        math_answer(task(), said("7"))
