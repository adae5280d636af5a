"""Both ends of the wire between a reward worker and its child process.

Parent to child: length-prefixed pickles of `Hello`, once, then `Batch`es. Child to parent: one JSON object per line, so
that nothing a reward function does to its process can run code in the parent. Every event carries what it is about:

    {"event": "ready"} | {"event": "refused", "message": ...}
    {"event": "calls", "ended": [[7, [{"value": ..., "parts": ..., "cause": ..., ...}, ...]], ...], "started": [8, ...]}

What happens together is told in one line: a line is a wake-up for the parent, on a core that is busy generating.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, BinaryIO

from rewards.load import RewardSpec
from rewards.outcome import Outcome
from rewards.types import Answer
from rollout.types import Task

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Hello:
    """What a child loads before it takes calls."""

    specs: tuple[RewardSpec, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Calls of one reward function on one task: `calls[i]` is an id and the answers of that call (one, unless the
    function is per group)."""

    key: str
    task: Task
    calls: tuple[tuple[int, tuple[Answer, ...]], ...]
    check: bool = False
    """Look for changes to task and answers."""


def encode(message: Hello | Batch) -> bytes:
    """A message to the child."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


def receive(stream: BinaryIO) -> Hello | Batch | None:
    """The next message from the parent, or None when the parent is gone."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(head)
    body = stream.read(size)
    return pickle.loads(body) if len(body) == size else None


def event(name: str, **values: Any) -> bytes:
    """A line to the parent."""
    return json.dumps({"event": name, **values}).encode() + b"\n"


def calls_event(*, started: Sequence[int] = (), ended: Sequence[tuple[int, Sequence[Outcome]]] = ()) -> bytes:
    """The line that says which calls have ended, with one outcome per answer, and which begin now."""
    results = [(number, [_set_fields(outcome) for outcome in outcomes]) for number, outcomes in ended]
    return event("calls", ended=results, started=started)


def read_calls(line: dict[str, Any]) -> tuple[list[tuple[int, tuple[Outcome, ...]]], list[int]]:
    """What `calls_event` was given: the ended calls with their outcomes, then the ids of the started ones."""
    ended = [(number, tuple(Outcome(**result) for result in results)) for number, results in line["ended"]]
    return ended, line["started"]


_UNSET = Outcome()
_FIELDS = tuple(field.name for field in fields(Outcome))


def _set_fields(outcome: Outcome) -> dict[str, Any]:
    return {name: value for name in _FIELDS if (value := getattr(outcome, name)) != getattr(_UNSET, name)}
