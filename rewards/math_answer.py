"""1 for a final answer that is mathematically the reference answer, 0 for any other.

The final answer is the content of the last `\\boxed{...}`, else the last line that is not empty, after a closing
`</think>`. From a line, math-verify takes the last formula or number. Numbers in any usual writing, fractions,
percentages, expressions, equations, inequalities, sets, tuples, intervals, matrices and amounts with units are
understood; units are left out of the comparison. Words are compared as text, case aside.

Bounded without signals or threads: an answer is at most `max_chars` long and nests at most 8 deep, powers 4 deep; what
could take long to evaluate (`rewards.math_compare.check`: towers of powers, large factorials, unevaluated sums or
integrals) scores 0 unless it is written exactly as the reference is.
"""

from __future__ import annotations

import logging
import re
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rewards.types import Answer
from rollout.types import Task

_MAX_DEPTH, _MAX_POWER_DEPTH = 8, 4
_MAX_DIGITS = 400
_MAX_BOXES, _MAX_BOX_CHARS = 20, 4000
_MAX_EXPONENT = 400
_CACHED_GOLDS, _CACHED_ANSWERS = 20_000, 4096

_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?([eE][+-]?\d{1,4})?")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{?(\d{1,40})\}?\{?(\d{1,40})\}?|([+-]?)(\d{1,40})/(\d{1,40})")
_LIST = re.compile(r"(\\\{(.*,.*)\\\})|([(\[])(.*,.*)([)\]])")
_BRACES = r"\{\}"
_GROUPED_DIGITS = re.compile(r"(?<!\d)\d{1,3},\d{3}(?!\d)")
_WORD = re.compile(r"[^\W\d_]{2,}([ '-][^\W\d_]+)*")
_BINOMIAL = re.compile(r"\\[dt]?binom\s*\{?\s*(\d+)")
_TOWER = re.compile(r"(?:\^[\s{(]*[^\s^{}()]{0,20})+")
_PLAIN_NAMES = re.compile(r"(?<![\\a-zA-Z])(pi|infinity|inf|infty)(?![a-zA-Z])")
_TEXT_WRAPPERS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\{([^{}]*)\}")
_NOISE = re.compile(r"\\left|\\right|\\[,;:! ]|\\displaystyle|~|\s+")
_LABEL = re.compile(r"^.*(?:answer|result)\s*(?:is|=|:)+\s*", re.IGNORECASE)
_FORMULA = re.compile(r"[$\\]|\d")


def math_answer(task: Task, answer: Answer, *, boxed_only: bool = False, max_chars: int = 600) -> float:
    """1 if the completion's final answer equals `task.answer`, else 0.

    Args:
        boxed_only: an answer without `\\boxed{}` scores 0.
        max_chars: a longer final answer scores 0.

    Raises:
        ValueError: the task has no answer to compare with.
    """
    if task.answer is None:
        raise ValueError(f"task {task.id} has no answer: set tasks.answer_key to the column with the reference answer")
    text = answer.text.rpartition("</think>")[2]
    boxed = last_boxed(text)
    if boxed is None and boxed_only:
        return 0.0
    got = boxed if boxed is not None else _last_line(text)
    if not got or len(got) > max_chars:
        return 0.0
    gold = last_boxed(task.answer)
    return float(same_answer(task.answer if gold is None else gold, got, boxed is not None))


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` with balanced braces, None without one. Looks at the last 20 only, and
    at 4,000 characters of each."""
    end = len(text)
    for _ in range(_MAX_BOXES):
        start = text.rfind("\\boxed{", 0, end)
        if start < 0:
            return None
        depth, first = 0, start + len("\\boxed")
        for index in range(first, min(len(text), first + _MAX_BOX_CHARS)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[first + 1 : index].strip()
        end = start
    return None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line.strip("`*_-= ")), "")


def same_answer(gold: str, got: str, exact: bool = True) -> bool:
    """Whether two final answers mean the same.

    Args:
        exact: `got` is the answer itself; otherwise it is a line of text that holds it.
    """
    mine, theirs = _normal(gold), _normal(got if exact else _after_label(got))
    if mine == theirs:
        return True
    number = _plain_number(mine)
    other = _plain_number(theirs)
    if number is not None and other is not None:
        return _same_number(number, other, "." in mine + theirs)
    if (verdict := _same_plain_list(mine, theirs)) is not None:
        return verdict
    if _WORD.fullmatch(_TEXT_WRAPPERS.sub(r"\1", gold).strip(" $.")):
        return _TEXT_WRAPPERS.sub(r"\1", mine).casefold() == _TEXT_WRAPPERS.sub(r"\1", theirs).casefold()
    if exact and _WORD.fullmatch(got.strip(" $.")):
        return False
    return _compare(gold, got, exact)


def _normal(text: str) -> str:
    text = _NOISE.sub("", text.strip().strip("*`").removesuffix("."))
    return text.replace("\\$", "").strip("$").replace("\\!", "").replace("\u2212", "-").replace("\\%", "%")


def _after_label(line: str) -> str:
    return _LABEL.sub("", line, count=1)


def _plain_number(text: str) -> Fraction | None:
    """The value of a number or of a fraction of two integers; None for anything else."""
    if text and _NUMBER.fullmatch(text) and any(character.isdigit() for character in text) and len(text) <= _MAX_DIGITS:
        mantissa, _, exponent = text.lower().replace(",", "").partition("e")
        if abs(int(exponent or 0)) > _MAX_EXPONENT or not mantissa.strip("+-."):
            return None
        return Fraction(Decimal(mantissa)) * Fraction(10) ** int(exponent or 0)
    if match := _FRACTION.fullmatch(text):
        sign, top, bottom = match.groups()[:3] if match[2] else match.groups()[3:]
        return Fraction(int(sign + top), int(bottom)) if int(bottom) else None
    return None


def _same_number(a: Fraction, b: Fraction, decimal: bool) -> bool:
    return a == b or (decimal and abs(a - b) <= Fraction(1, 10**6))


def _same_plain_list(mine: str, theirs: str) -> bool | None:
    """For two sets, two tuples or two intervals of plain numbers, which need no parser; None for anything else."""
    (brackets, numbers), (other_brackets, others) = _plain_list(mine), _plain_list(theirs)
    decimal = "." in mine + theirs
    if not numbers or not others or brackets != other_brackets or (decimal and brackets == _BRACES):
        return None
    if brackets == _BRACES:
        return sorted(numbers) == sorted(others)
    return len(numbers) == len(others) and all(
        _same_number(a, b, decimal) for a, b in zip(numbers, others, strict=True)
    )


def _plain_list(text: str) -> tuple[str, list[Fraction]]:
    """Brackets and numbers; no numbers for anything else, or where a comma may group digits."""
    match = _LIST.fullmatch(text)
    if match is None or _GROUPED_DIGITS.search(text):
        return "", []
    values = [_plain_number(element) for element in (match[2] or match[4]).split(",")]
    numbers = [value for value in values if value is not None]
    brackets = _BRACES if match[2] else match[3] + match[5]
    return brackets, numbers if len(numbers) == len(values) else []


def _compare(gold: str, got: str, exact: bool) -> bool:
    from rewards import math_compare  # sympy takes a second to import: only once it is needed

    wanted, found = _parse_gold(gold), _parse_answer(got, exact)
    if wanted is None or found is None:
        return False
    try:
        return math_compare.same(wanted, found)
    except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError):
        return False  # sympy cannot relate the two: a set and a number, a symbol and a truth value


@lru_cache(maxsize=_CACHED_GOLDS)
def _parse_gold(text: str) -> Any:
    return _parse(text, exact=True)


@lru_cache(maxsize=_CACHED_ANSWERS)
def _parse_answer(text: str, exact: bool) -> Any:
    return _parse(text, exact=exact)


def _parse(text: str, *, exact: bool) -> Any:
    """A checked sympy object; None for what cannot be parsed or could take long to evaluate."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    from rewards import math_compare

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeout is off, which is intended
    if (not exact and not _FORMULA.search(text)) or not _harmless(text):
        return None
    text = _PLAIN_NAMES.sub(lambda match: " \\pi " if match[1] == "pi" else " \\infty ", text)
    text = f"\\boxed{{{text.strip('$ ')}}}" if exact else text
    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    found = parse(text, targets, fallback_mode="no_fallback", parsing_timeout=0)
    if not found:
        return None
    try:
        math_compare.check(found[0])
    except (math_compare.TooComplex, RecursionError, OverflowError, TypeError):
        return None
    return found[0]


def _harmless(text: str) -> bool:
    """What the parser itself could hang on or evaluate at once."""
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    digits = max((len(run) for run in re.findall(r"\d+", text)), default=0)
    binomials = all(len(top) <= 3 for top in _BINOMIAL.findall(text))
    towers = max((run.count("^") for run in _TOWER.findall(text)), default=0)
    return deepest <= _MAX_DEPTH and towers <= _MAX_POWER_DEPTH and digits <= _MAX_DIGITS and binomials
