"""Both ends of the wire between a reward worker and its child process.

Parent to child: length-prefixed pickles of `Hello`, once, then `Batch`es. Child to parent: one JSON object per line, so
that nothing a reward function does to its process can run code in the parent. Every event carries what it is about:

    {"event": "ready"} | {"event": "refused", "message": ...}
    {"event": "start", "call": 7}
    {"event": "end", "call": 7, "results": [{"value": ..., "parts": ..., "cause": ..., ...}, ...]}
"""

from __future__ import annotations

import json
import pickle
import socket
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

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


def receive(sock: socket.socket) -> Hello | Batch | None:
    """The next message from the parent, or None when the parent is gone."""
    head = _receive_exactly(sock, _LENGTH.size)
    body = None if head is None else _receive_exactly(sock, _LENGTH.unpack(head)[0])
    return None if body is None else pickle.loads(body)


def event(name: str, **values: Any) -> bytes:
    """A line to the parent."""
    return json.dumps({"event": name, **values}).encode() + b"\n"


def end_event(call: int, outcomes: Sequence[Outcome]) -> bytes:
    """The line that ends a call."""
    return event("end", call=call, results=[asdict(outcome) for outcome in outcomes])


def read_outcomes(line: dict[str, Any]) -> tuple[Outcome, ...]:
    """The outcomes of an `end` event, one per answer of its call."""
    return tuple(Outcome(**result) for result in line["results"])


def _receive_exactly(sock: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(min(size - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)
