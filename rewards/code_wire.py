"""What travels between a tested Python program and its grader: JSON lines with tags for what JSON has no word for.

Plain data only, never pickle: a hostile program can send nothing but built-in values. Runs inside a jail as well, with
the standard library alone.
"""

from __future__ import annotations

import builtins
import json
import os
import select
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_MESSAGE_BYTES = 8 << 20
_CHUNK = 1 << 16


class CandidateGone(BaseException):
    """The program ended, or stopped answering, before its tests were through. Not an `Exception`, so that test code
    which expects a failure does not take this for one."""


class CandidateError(Exception):
    """The program raised something that is not a built-in exception."""


class Unsendable(TypeError):
    """A test passes a value that cannot cross the wire: a function, an instance of its own class."""


def encode(value: Any, keep: Callable[[Any], int | str | None]) -> Any:
    """Python value -> JSON value. `keep` takes what is not plain data and gives what it is known by, or None.

    Subclasses of the built-in types are sent as those types, read without their own methods.
    """
    if isinstance(value, (bool, int, float, str, bytes, bytearray)) or value is None:
        return _encode_scalar(value)
    if isinstance(value, list):
        return [encode(item, keep) for item in list.__iter__(value)]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            items: Any = kind.__iter__(value)  # pyright: ignore[reportArgumentType]
            return {kind.__name__: [encode(item, keep) for item in items]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, keep), encode(item, keep)] for key, item in dict.items(value)]}
    if type(value) in (Fraction, Decimal, complex):
        return {type(value).__name__: str(value)}
    known = keep(value)
    if known is None:
        raise Unsendable(f"a {type(value).__name__} cannot be sent to the program under test")
    return {"object": known}


def _encode_scalar(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        number = int.__int__(value)
        return number if abs(number) < 1 << 62 else {"int": hex(number)}
    if isinstance(value, float):
        return {"float": float.__repr__(value)}
    return str.__str__(value) if isinstance(value, str) else {"bytes": bytes(value).hex()}


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "Fraction": Fraction,
    "Decimal": Decimal,
    "complex": complex,
    "bytes": bytes.fromhex,
}


def decode(value: Any, find: Callable[[Any], Any]) -> Any:
    """JSON value -> Python value, of built-in types alone; `find` gives what stands for an answer of `keep`."""
    if isinstance(value, list):
        return [decode(item, find) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "object":
        return find(content)
    if tag == "dict":
        return {decode(key, find): decode(item, find) for key, item in content}
    if tag in ("tuple", "set", "frozenset"):
        return getattr(builtins, tag)(decode(item, find) for item in content)
    return _DECODERS[tag](content)


class Pipe:
    """Lines of JSON over two descriptors, with a deadline on both directions."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = reads, writes
        self._buffer = bytearray()
        self.deadline = float("inf")  # of time.monotonic()
        os.set_blocking(reads, False)
        os.set_blocking(writes, False)

    def _wait(self, *, reading: bool) -> None:
        wait = None if self.deadline == float("inf") else max(0.0, self.deadline - time.monotonic())
        ready = select.select([self._reads] if reading else [], [] if reading else [self._writes], [], wait)
        if not any(ready):
            raise CandidateGone("no answer in time")

    def send(self, message: Any) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            self._wait(reading=False)
            try:
                data = data[os.write(self._writes, data[:4096]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise CandidateGone("the program ended early") from None

    def receive(self) -> Any:
        """The next message; None at the end."""
        start = 0
        while (end := self._buffer.find(b"\n", start)) < 0:
            start = len(self._buffer)
            if start > MAX_MESSAGE_BYTES:
                raise CandidateGone(f"an answer of more than {MAX_MESSAGE_BYTES} bytes")
            self._wait(reading=True)
            data = os.read(self._reads, _CHUNK)
            if not data:
                return None
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise CandidateGone("an answer that is not JSON") from None
