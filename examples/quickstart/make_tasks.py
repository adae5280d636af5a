"""Writes `tasks/train.jsonl` and `tasks/eval.jsonl`: additions of two two-digit numbers with a two-digit sum.

Run `python examples/quickstart/make_tasks.py` to make the committed files again; they come out the same every time.
Four sums in five need a carry (27+45), one in five does not (21+45): what the base model gets wrong is the carry.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

TASKS_DIR = Path(__file__).parent / "tasks"
NUM_EVAL = 200
CARRY_SHARE = 0.8


def needs_carry(a: int, b: int) -> bool:
    """Whether the ones of `a + b` spill into the tens."""
    return a % 10 + b % 10 >= 10


def all_sums() -> list[tuple[int, int]]:
    """Every pair of two-digit numbers whose sum has two digits, in order."""
    return [(a, b) for a in range(10, 90) for b in range(10, 100 - a)]


def split(seed: int = 0) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Training and held-out pairs, disjoint, each with `CARRY_SHARE` sums that need a carry."""
    pairs = all_sums()
    random.Random(seed).shuffle(pairs)
    carry = [pair for pair in pairs if needs_carry(*pair)]
    plain = [pair for pair in pairs if not needs_carry(*pair)][: round(len(carry) * (1 / CARRY_SHARE - 1))]
    num_carry = round(NUM_EVAL * CARRY_SHARE)
    held_out = carry[:num_carry] + plain[: NUM_EVAL - num_carry]
    train = carry[num_carry:] + plain[NUM_EVAL - num_carry :]
    random.Random(seed + 1).shuffle(held_out)
    random.Random(seed + 2).shuffle(train)
    return train, held_out


def write_tasks(path: Path, pairs: list[tuple[int, int]]) -> None:
    """One task per line: the prompt, its answer, its domain."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "domain": "arithmetic"} for a, b in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    TASKS_DIR.mkdir(exist_ok=True)
    for name, pairs in zip(("train", "eval"), split(), strict=True):
        write_tasks(TASKS_DIR / f"{name}.jsonl", pairs)
