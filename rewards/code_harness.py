"""Both ends of the wire between a tested Python program and whoever holds the expected answers.

`serve` runs in a jail beside the program and answers requests: call this, read that attribute. `Client` sends them,
from the reward's own process or from `run_tests`, which runs a data set's test code in a second jail. Only arguments
go in and only plain data comes out, so the program sees no expected answer and the comparison is made with the
grader's own types: an `__eq__` that always says yes stays on its side of the wire. Standard library alone.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rewards.code_wire import CandidateError, CandidateGone, Pipe, Unsendable, decode, encode

_MODULE = "solution"


# The program's side.


def serve(pipe: Pipe, path: str) -> None:
    """Says that it is there, runs the program at `path` as a module, tells the names it defines, answers requests."""
    pipe.send("ready")
    module = types.ModuleType(_MODULE)
    sys.modules[_MODULE] = module
    objects: list[Any] = []
    pipe.send(_answer(lambda: _load(module, path), objects))
    while (request := pipe.receive()) is not None:
        pipe.send(_reply(request, module, objects))


def _reply(request: Any, module: types.ModuleType, objects: list[Any]) -> dict[str, Any]:
    action, target, *rest = request
    arguments = decode(rest, lambda known: _resolve(known, module, objects))
    reply = _answer(lambda: _act(action, _resolve(target, module, objects), arguments), objects)
    if action == "call":
        after = _answer(lambda: arguments[0], objects)
        if "value" in after and json.dumps(after["value"]) != json.dumps(rest[0]):
            reply["arguments"] = after["value"]
    return reply


def _load(module: types.ModuleType, path: str) -> list[str]:
    with open(path, encoding="utf-8", errors="surrogatepass") as file:
        source = file.read()
    exec(compile(source, "solution.py", "exec"), module.__dict__)
    return [name for name in vars(module) if not name.startswith("__")]


def _answer(work: Callable[[], Any], objects: list[Any]) -> dict[str, Any]:
    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    try:
        return {"value": encode(work(), keep)}
    except BaseException as error:
        names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
        try:
            text = str(error)[:2000]
        except BaseException:  # the program's own __str__ may do anything
            text = ""
        return {"raised": names, "kind": type(error).__name__, "text": text}


def _resolve(target: Any, module: types.ModuleType, objects: list[Any]) -> Any:
    """A kept object by number, or a global by name; `Class.method` is the method of a fresh `Class()`."""
    if isinstance(target, int):
        return objects[target]
    first, *others = target.split(".")
    found = getattr(module, first)
    for name in others:
        found = getattr(found() if isinstance(found, type) else found, name)
    return found


def _act(action: str, target: Any, arguments: list[Any]) -> Any:
    match action:
        case "call":
            return target(*arguments[0], **arguments[1])
        case "get":
            return getattr(target, arguments[0])
        case "set":
            return setattr(target, arguments[0], arguments[1])
        case "item":
            return target[arguments[0]]
        case "length":
            return len(target)
        case "list":
            return list(target)
    return str(target)


# The grader's side.


class Client:
    """Talks to `serve`.

    Args:
        seconds: for each answer; None = no limit.

    Raises:
        CandidateGone: from every method, once the program no longer answers.
    """

    def __init__(self, pipe: Pipe, *, seconds: float | None = None) -> None:
        self._pipe = pipe
        self._seconds = seconds

    def names(self) -> tuple[str, ...]:
        """The program's global names; to be called once, first. Raises what the program raised while it loaded."""
        names = self._value(self._receive())
        return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()

    def request(self, action: str, target: str | int, *arguments: Any) -> Any:
        """One action on a global name or a kept object; see `_act`. Lists, dicts and sets that a call changed in place
        are changed here too."""
        self._start_clock()
        self._pipe.send([action, target, *(encode(argument, _known_as) for argument in arguments)])
        reply = self._receive()
        if action == "call" and isinstance(reply, dict) and "arguments" in reply:
            _copy_back(arguments[0], self._decode(reply["arguments"]))
        return self._value(reply)

    def _start_clock(self) -> None:
        if self._seconds is not None:
            self._pipe.deadline = time.monotonic() + self._seconds

    def _receive(self) -> Any:
        self._start_clock()
        reply = self._pipe.receive()
        if reply is None:
            raise CandidateGone("the program ended early")
        return reply

    def _decode(self, value: Any) -> Any:
        try:
            return decode(value, lambda number: Remote(self, int(number)))
        except Exception:  # whatever can be wrong with an answer, it is the program's doing
            raise CandidateGone("an answer that means nothing") from None

    def _value(self, reply: Any) -> Any:
        if isinstance(reply, dict) and "value" in reply:
            return self._decode(reply["value"])
        if not isinstance(reply, dict) or not isinstance(reply.get("raised"), list):
            raise CandidateGone("an answer that means nothing")
        text = str(reply.get("text"))
        for name in reply["raised"]:
            kind = getattr(builtins, name, None) if isinstance(name, str) else None
            if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
                raise _exception(kind, text)
        raise CandidateError(f"{reply.get('kind')}: {text}")


def _exception(kind: type[Exception], text: str) -> Exception:
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError and its like want more
        return CandidateError(f"{kind.__name__}: {text}")


def _copy_back(arguments: Any, changed: Any) -> None:
    if not isinstance(changed, list) or len(changed) != len(arguments):
        return
    for mine, theirs in zip(arguments, changed, strict=True):
        if isinstance(mine, list) and isinstance(theirs, list):
            mine[:] = theirs
        elif (isinstance(mine, dict) and isinstance(theirs, dict)) or (
            isinstance(mine, set) and isinstance(theirs, set)
        ):
            mine.clear()
            mine.update(theirs)


class Remote:
    """Stands for a function, class or object that lives in the program. Equal to itself alone."""

    def __init__(self, client: Client, target: str | int) -> None:
        object.__setattr__(self, "_client", client)
        object.__setattr__(self, "_target", target)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._client.request("call", self._target, list(arguments), named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._client.request("get", self._target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._client.request("set", self._target, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._client.request("item", self._target, key)

    def __len__(self) -> int:
        return self._client.request("length", self._target)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._client.request("list", self._target))

    def __str__(self) -> str:
        return self._client.request("text", self._target)

    def __bool__(self) -> bool:
        return True


def _known_as(value: Any) -> int | str | None:
    return value._target if isinstance(value, Remote) else None


def run_tests(
    client: Client, sources: Sequence[str], *, entry_point: str | None, names: Sequence[str] | None
) -> list[str]:
    """Runs each test source against the program: an empty text for one that passed, else what went wrong.

    A source sees the program's globals (those in `names`, if given), except that built-in names stay built-in, and
    standard modules that it uses without an import are the real ones. After it ran, its `check(entry_point)`, its
    `unittest.TestCase` classes and its `test_*` functions run.
    """
    offered = client.names()
    wanted = names or ([entry_point] if entry_point else offered)
    remotes = {name: Remote(client, name) for name in wanted if name in offered and not hasattr(builtins, name)}
    module = types.ModuleType(_MODULE)
    module.__dict__.update(remotes)
    sys.modules[_MODULE] = module
    return [_run_source(source, remotes, entry_point) for source in sources]


def _run_source(source: str, remotes: Mapping[str, Remote], entry_point: str | None) -> str:
    try:
        tree = ast.parse(source)
        scope: dict[str, Any] = {"__name__": "tests", **remotes, **_modules_used(tree)}
        exec(compile(tree, "tests.py", "exec"), scope)
        if entry_point is not None and callable(check := scope.get("check")) and not isinstance(check, Remote):
            check(remotes.get(entry_point))
        for name, function in list(scope.items()):
            if name.startswith("test_") and isinstance(function, types.FunctionType):
                function()
        return _run_cases(scope)
    except BaseException as error:
        kind = "unsendable" if isinstance(error, Unsendable) else "failed"
        return f"{kind}: {traceback.format_exception_only(error)[-1].strip()}"[:500]


def _modules_used(tree: ast.AST) -> dict[str, types.ModuleType]:
    """Modules named before a dot without an import: the program's own `math` must not be what a test computes with."""
    bases = {
        node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    return {name: importlib.import_module(name) for name in bases & sys.stdlib_module_names if name != "this"}


def _run_cases(scope: Mapping[str, Any]) -> str:
    if "unittest" not in sys.modules:
        return ""
    import unittest

    kinds = [kind for kind in scope.values() if isinstance(kind, type) and issubclass(kind, unittest.TestCase)]
    suite = unittest.TestSuite(map(unittest.defaultTestLoader.loadTestsFromTestCase, kinds))
    result = suite.run(unittest.TestResult())
    wrong = [*result.failures, *result.errors]
    return f"failed: {wrong[0][0]}: {wrong[0][1]}"[:500] if wrong else ""


def _test_main(pipe: Pipe) -> None:
    """Reads what to test from stdin; the results go out behind a nonce that only the reward and this process know."""
    order = json.loads(sys.stdin.read())
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        results = run_tests(Client(pipe), order["sources"], entry_point=order["entry_point"], names=order["names"])
    except BaseException as error:
        text = f"failed: {traceback.format_exception_only(error)[-1].strip()}"[:500]
        results = [text] * len(order["sources"])
    os.write(out, f"\n{order['nonce']}{json.dumps(results)}\n".encode())


def main(role: str, reads: str, writes: str, path: str = "") -> None:
    """Entry point inside a jail: `role` is `serve` or `test`, the next two are open descriptors."""
    pipe = Pipe(int(reads), int(writes))
    if role == "serve":
        serve(pipe, path)
    else:
        _test_main(pipe)
