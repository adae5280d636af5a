"""Writes `tasks/train.jsonl` and `tasks/eval.jsonl`: sums, one-line programs and polite requests in one file.

Run `python examples/mixed/make_tasks.py` to make the committed files again; they come out the same every time.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TASKS_DIR = Path(__file__).parent / "tasks"
NUM_TRAIN, NUM_EVAL = 120, 24
"""Tasks of each domain."""

OPERATORS = {"plus": "+", "minus": "-", "times": "*"}
LETTERS = "abcdeghkmnpqrstuvwxyz"
NAMES = ("ann", "ben", "eva", "ida", "jim", "kai", "lea", "max", "mia", "tom", "uma", "zoe")
VERBS = ("call", "come", "eat", "go", "help", "look", "read", "sing", "sit", "stay", "swim", "wait", "walk", "write")
ARGUMENTS = ((7, 3), (2, 9), (5, 5))

Row = dict[str, Any]


def arithmetic(a: int, b: int) -> Row:
    return {"domain": "arithmetic", "prompt": f"{a}+{b}=", "answer": str(a + b)}


def code(x: str, y: str, word: str) -> Row:
    """A task for `rewards.code_tests`: the program is called, and what it returns is compared."""
    results = {"plus": lambda m, n: m + n, "minus": lambda m, n: m - n, "times": lambda m, n: m * n}
    cases = [{"call": "f", "args": pair, "returns": results[word](*pair)} for pair in ARGUMENTS]
    program = f"f=lambda {x},{y}:{x}{OPERATORS[word]}{y}"
    return {"domain": "code", "prompt": f"f is {x} {word} {y}: ", "answer": program, "tests": {"cases": cases}}


def text(name: str, verb: str) -> Row:
    """A task for `rewards.rubric_judge`: the rubric is data, and this one is about this prompt."""
    criteria = [
        {"id": "polite", "text": "The request is courteous: it has a greeting and says please.", "weight": 2},
        {"id": "complete", "text": f"It is clear that {name} is meant, and that the request is to {verb}."},
    ]
    rubric = {"criteria": criteria, "reference": f"dear {name}, please {verb}."}
    return {"domain": "text", "prompt": f"ask {name} to {verb}: ", "answer": rubric["reference"], "rubric": rubric}


def all_rows(seed: int = 0) -> dict[str, list[Row]]:
    """Every task of each domain, in a seeded order."""
    rows = {
        "arithmetic": [arithmetic(a, b) for a in range(10, 90) for b in range(10, 100 - a) if a % 10 + b % 10 >= 10],
        "code": [code(x, y, word) for x in LETTERS for y in LETTERS if x != y for word in OPERATORS],
        "text": [text(name, verb) for name in NAMES for verb in VERBS],
    }
    for domain, members in rows.items():
        random.Random(f"{seed} {domain}").shuffle(members)
    return rows


def main() -> None:
    """Writes both files; no task is in both."""
    TASKS_DIR.mkdir(exist_ok=True)
    for name, first, last in (("eval", 0, NUM_EVAL), ("train", NUM_EVAL, NUM_EVAL + NUM_TRAIN)):
        rows = [row for members in all_rows().values() for row in members[first:last]]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (TASKS_DIR / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
