"""Reward functions that misbehave as the answer's text tells them to; they run in reward processes only."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rewards.types import Abstain, Answer, RewardResult
from rollout.types import Task

BUSY_S = 0.2
HOARD: list[bytearray] = []


def misbehave(task: Task, answer: Answer) -> Any:
    word, *arguments = answer.text.split()
    return DEEDS[word](*arguments) if word in DEEDS else RETURNS.get(word, 1.0)


def _raise(error: BaseException) -> None:
    raise error


def _hang_with_child(path: str) -> None:
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    Path(path).write_text(str(child.pid), encoding="ascii")
    time.sleep(1000)


def _hoard() -> None:
    while True:
        HOARD.append(bytearray(64 << 20))


def _flood() -> None:
    while True:
        print("noise " * 1000)


def _chatter() -> float:
    print("a few words", file=sys.stderr)
    return 1.0


def _close_everything() -> float:
    os.closerange(3, 256)
    return 1.0


DEEDS: dict[str, Callable[..., Any]] = {
    "raise": lambda: _raise(KeyError("x")),
    "abstain": lambda: _raise(Abstain("no opinion")),
    "sys-exit": lambda: sys.exit(0),
    "exit": lambda: os._exit(3),
    "crash": lambda: ctypes.string_at(0),
    "hang": lambda: time.sleep(1000),
    "hang-with-child": _hang_with_child,
    "hoard": _hoard,
    "flood": _flood,
    "chatter": _chatter,
    "close-everything": _close_everything,
}
RETURNS: dict[str, Any] = {"none": None, "text": "0.5", "nan": {"a": float("nan")}}


async def misbehave_later(task: Task, answer: Answer) -> Any:
    await asyncio.sleep(0.05)
    match answer.text:
        case "hang":
            await asyncio.sleep(1000)
        case "block":
            time.sleep(1000)
        case "patient":
            await asyncio.sleep(0.3)
            return 1.0
    return misbehave(task, answer)


async def busy_later(task: Task, answer: Answer) -> float:
    """Works instead of waiting, and lets no other call run meanwhile."""
    time.sleep(1000 if answer.text == "block" else BUSY_S)
    return 1.0


def where(task: Task, answer: Answer) -> dict[str, float]:
    return {"pid": os.getpid(), "session": os.getsid(0)}


def measured(task: Task, answer: Answer, *, scale: float = 1.0) -> RewardResult:
    return RewardResult(scale * answer.num_tokens, {"tokens": answer.num_tokens})


def rank(task: Task, answers: Sequence[Answer]) -> list[Any]:
    if any(answer.text == "exit" for answer in answers):
        os._exit(3)
    if any(answer.text == "short" for answer in answers):
        return [1.0]
    longest = max(answer.num_tokens for answer in answers)
    return [
        Abstain("empty") if not answer.text else RewardResult(answer.num_tokens / longest, {"longest": longest})
        for answer in answers
    ]


def mutating(task: Task, answer: Answer) -> float:
    task.fields["seen"] = task.fields.get("seen", 0) + 1  # pyright: ignore[reportIndexIssue]
    return 1.0


def poisoning(task: Task, answer: Answer) -> float:
    before = len(task.fields)
    task.fields["lock"] = threading.Lock()  # pyright: ignore[reportIndexIssue]
    return float(before)


async def poisoning_later(task: Task, answer: Answer) -> float:
    return poisoning(task, answer)


def counting(task: Task, answer: Answer) -> float:
    HOARD.append(bytearray(1))
    return float(len(HOARD))


def slow(task: Task, answer: Answer) -> float:
    time.sleep(0.3)
    return 1.0


async def one_second(task: Task, answer: Answer) -> float:
    await asyncio.sleep(1.0)
    return 1.0
