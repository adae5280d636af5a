"""How fast the shipped rule-based rewards judge, on one core and on two.

    python -m benchmarks.rewards

Answers checked per second by `math_answer`, on a mix of writings in which no pair of answers repeats unless it says
so, and programs judged per second by `code_tests`, each in a jail of its own. Two processes are what a machine with
two cores gives; every one has a single thread.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator

from benchmarks.machine import describe_machine
from rewards.code_tests import code_tests
from rewards.language_consistency import language_consistency
from rewards.math_answer import math_answer
from rewards.sandbox.run import strongest_isolation
from rewards.types import Answer
from rollout.types import FinishReason, Task

SECONDS = 5.0
WARM_UP_SECONDS = 2.0
PROCESSES = 2

Judge = Callable[[int], float]
"""Judges the i-th sample and returns its reward, which must be 1."""


def said(text: str) -> Answer:
    return Answer(text, len(text), FinishReason.STOP)


def plain_numbers(index: int) -> float:
    """Integers, decimals and fractions: most of GSM8K and much of AIME."""
    number = index % 100_000 + 7
    text = (f"{number}", f"{number}.0", rf"\frac{{{2 * number}}}{{2}}", f"{number:,}")[index % 4]
    return math_answer(Task("t", "math", "?", str(number)), said(rf"so it is \boxed{{{text}}}"))


def formulas(index: int) -> float:
    """Radicals, fractions of expressions, polynomials, intervals, sets: what MATH asks for; every one is parsed."""
    n = index % 1_000_003 + 2
    gold, got = (
        (rf"{n}\sqrt{{2}}", rf"\sqrt{{{2 * n * n}}}"),
        (f"x^2+{2 * n}x+{n * n}", f"(x+{n})^2"),
        (f"[{n}, {n + 1})", f"[{n},{n + 1})"),
        (rf"\{{{n}, {n + 1}\}}", rf"\{{{n + 1}, {n}\}}"),
        (rf"\frac{{\pi}}{{{n}}}", rf"\pi/{n}"),
    )[index % 5]
    return math_answer(Task("t", "math", "?", gold), said(rf"\boxed{{{got}}}"))


def mixed(index: int) -> float:
    """Three plain numbers to one formula."""
    return formulas(index) if index % 4 == 0 else plain_numbers(index)


def groups(index: int) -> float:
    """Formulas in groups of 16 completions that agree on 4 answers, as sampling gives them."""
    group, sample = divmod(index, 16)
    return formulas(group * 4 + sample % 4)


def stdin_programs(index: int) -> float:
    """One program with one case of stdin and stdout."""
    tests = {"cases": [{"stdin": f"{index} 1\n", "stdout": f"{index + 1}\n"}]}
    return code_tests(Task("t", "code", "?", None, {"tests": tests}), said("print(sum(map(int, input().split())))"))


def called_functions(index: int) -> float:
    """One function, called ten times."""
    calls = [{"call": "add", "args": [index, n], "returns": index + n} for n in range(10)]
    return code_tests(Task("t", "code", "?", None, {"tests": calls}), said("def add(a, b): return a + b"))


def unit_tested_functions(index: int) -> float:
    """One function under three unit tests, which run in a second jail."""
    tests = {"unit_tests": [f"assert add({index}, {n}) == {index + n}" for n in range(3)]}
    return code_tests(Task("t", "code", "?", None, {"tests": tests}), said("def add(a, b): return a + b"))


def languages(index: int) -> float:
    """Six sentences of English."""
    text = f"We need to add {index} apples to the basket before we can count all of them together. " * 6
    return language_consistency(Task("t", "text", "?"), said(text), language="en")


MEASURED: tuple[tuple[str, Judge], ...] = (
    ("math_answer, plain numbers", plain_numbers),
    ("math_answer, three numbers to one formula", mixed),
    ("math_answer, formulas, all different", formulas),
    ("math_answer, formulas, groups of 16", groups),
    ("code_tests, stdin and stdout", stdin_programs),
    ("code_tests, ten calls", called_functions),
    ("code_tests, three unit tests", unit_tested_functions),
    ("language_consistency, 85 words", languages),
)


def rate(judge: Judge, first: int) -> float:
    """Samples per second of one process, after a warm-up."""
    samples = iter(range(first, first + 10**9))
    _judge_for(WARM_UP_SECONDS, judge, samples)
    started = time.perf_counter()
    count = _judge_for(SECONDS, judge, samples)
    return count / (time.perf_counter() - started)


def _judge_for(seconds: float, judge: Judge, samples: Iterator[int]) -> int:
    end = time.perf_counter() + seconds
    count = 0
    while time.perf_counter() < end:
        index = next(samples)
        reward = judge(index)
        if reward != 1.0:
            raise AssertionError(f"{judge.__name__}: sample {index} got {reward}, want 1")
        count += 1
    return count


def main() -> None:
    """Prints the table."""
    print(describe_machine())
    print(f"isolation: {strongest_isolation()}\n")
    print(f"{'samples per second':<44}{'1 process':>11}{f'{PROCESSES} processes':>13}")
    context = multiprocessing.get_context("spawn")
    with context.Pool(PROCESSES) as pool:
        for name, judge in MEASURED:
            alone = pool.apply(rate, (judge, 0))
            together = sum(pool.starmap(rate, [(judge, (part + 1) * 10**8) for part in range(PROCESSES)]))
            print(f"{name:<44}{alone:>11.0f}{together:>13.0f}", flush=True)


if __name__ == "__main__":
    main()
