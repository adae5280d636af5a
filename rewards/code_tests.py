"""Programs checked against test cases, in a jail (`rewards.sandbox` says what it covers and what it does not).

The tests come from a column of the data set, `tests` unless the entry says otherwise: an object, a list of cases, or
either as a JSON string. Three kinds, of which a task has one:

    {"cases": [{"stdin": "2 3\\n", "stdout": "5\\n"}, ...]}              whole programs, any language
    {"cases": [{"call": "add", "args": [2, 3], "returns": 5},            Python functions; also "kwargs", and
               {"call": "Solution.div", "args": [1, 0],                  "raises" with an exception's name;
                "raises": "ZeroDivisionError"}, ...]}                    Class.method is called on a fresh Class()
    {"unit_tests": "assert add(2, 3) == 5" or a list of such sources}    Python test code: asserts, `check(candidate)`
                                                                         as in HumanEval, unittest classes, test_*
                                                                         functions; may `from solution import add`

and beside them `"language": "cpp"` (or as a field of the task; python, c, cpp, javascript, rust where installed),
`"entry_point": "add"` (what `check` is called with) and `"names": [...]`: the only names that unit tests take from the
program. Without `names` and `entry_point` they take any name that they do not define themselves, so a helper that a
test computes with must be defined in the test. A plain string that is not JSON is one source of unit tests.

The program is the last fenced block of the completion, or all of it where there is none; what stands before a closing
`</think>` does not count.

The grader is out of the program's reach: expected outputs and values never enter its jail. Output is compared, and
cases are judged, in the reward's process; unit tests run in a second jail and reach the program over a wire that
carries arguments in and plain data out (`rewards.code_harness`). Ending early, with whatever exit code, is not a pass:
every case needs its own output or answer. Values compare as Python's `==` does, with tuples and lists alike and floats
within `float_tolerance` in `call` cases; an instance of the program's own class is never equal to anything.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import secrets
import select
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import cache_from_source
from typing import Any

import rewards
from rewards import code_harness, code_wire
from rewards.code_harness import Client
from rewards.code_wire import CandidateError, CandidateGone, Pipe
from rewards.languages import Language, language_named
from rewards.sandbox.run import (
    PACKAGE_ROOT,
    PYTHON,
    Command,
    Isolation,
    Jail,
    Limits,
    SandboxError,
    run,
    strongest_isolation,
)
from rewards.types import Answer
from rollout.types import Task

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_MAX_PROGRAM_CHARS = 200_000
_COMPILE = Limits(
    seconds=30.0, memory_bytes=2 << 30, processes=64, open_files=256, file_bytes=128 << 20, limit_address_space=False
)
_UNIT_TESTS_FACTOR = 10
_START_SECONDS = 20.0
"""For a jail and its interpreter to start on a busy machine."""
_LAUNCH = "import sys; sys.path.append(sys.argv[1]); from rewards.code_harness import main; main(*sys.argv[2:])"
_PYTHON = (PYTHON, "-I", "-S", "-E", "-B", "-X", "utf8", "-c", _LAUNCH, PACKAGE_ROOT)


def code_tests(
    task: Task,
    answer: Answer,
    *,
    tests_key: str = "tests",
    partial: bool = False,
    seconds: float = 5.0,
    memory_mb: int = 512,
    isolation: str = "landlock",
) -> float:
    """1 if the program in the completion passes every test of its task, else 0.

    Args:
        tests_key: the task field with the tests.
        partial: the share of tests passed instead of all or nothing.
        seconds: for each stdin case and each call; all unit tests of a task together have ten times as long.
        memory_mb: for the program, its children included.
        isolation: the weakest kind accepted: `namespaces`, `landlock` or `limits`.

    Raises:
        ValueError: the task has no usable tests, or wants a language that this machine does not have.
        SandboxError: the jail cannot be built here, or not as strong as `isolation` asks.
    """
    weakest = Isolation(isolation)
    if not strongest_isolation().at_least(weakest):
        raise SandboxError(
            f"code_tests: the strongest isolation here is {strongest_isolation()!s}, the entry asks for {weakest!s}: "
            f'allow user namespaces or Landlock, or accept it with isolation = "{strongest_isolation()!s}"'
        )
    tests = read_tests(task, tests_key)
    program = extract_program(answer.text)
    limits = Limits(seconds=seconds, memory_bytes=memory_mb << 20)
    if not program or len(program) > _MAX_PROGRAM_CHARS:
        return 0.0
    if tests.sources:
        passed = _run_unit_tests(program, tests, limits)
    elif "call" in tests.cases[0]:
        passed = _run_calls(program, tests, limits)
    else:
        passed = _run_programs(program, tests, limits)
    return sum(passed) / len(passed) if partial else float(all(passed))


@dataclass(frozen=True, slots=True)
class CodeTests:
    """A task's tests, read and checked: either `cases` or `sources`."""

    language: str
    cases: tuple[Mapping[str, Any], ...]
    sources: tuple[str, ...]
    entry_point: str | None
    names: tuple[str, ...] | None
    float_tolerance: float


def read_tests(task: Task, key: str) -> CodeTests:
    """The tests of a task, from its field `key`.

    Raises:
        ValueError: they are missing or malformed; the message names the task and the field.
    """
    where = f"code_tests: task {task.id}, field {key!r}"
    raw: Any = task.fields.get(key)
    if isinstance(raw, str):
        raw = _from_text(raw, where)
    if isinstance(raw, Sequence) and not isinstance(raw, str):
        raw = {"cases": raw}
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}: no tests: give an object with `cases` or `unit_tests`, or set tests_key")
    cases: tuple[Any, ...] = tuple(raw.get("cases") or ())
    sources: Any = raw.get("unit_tests") or ()
    sources = (sources,) if isinstance(sources, str) else tuple(sources)
    if bool(cases) == bool(sources):
        raise ValueError(f"{where}: want `cases` or `unit_tests`, one of them and not empty")
    language = str(raw.get("language") or task.fields.get("language") or "python")
    _check_cases(cases, where)
    if (sources or "call" in cases[0]) and language.lower() not in ("python", "python3", "py"):
        raise ValueError(f"{where}: calls and unit tests are for Python; test {language} with stdin and stdout")
    names = raw.get("names")
    tolerance = float(raw.get("float_tolerance", 1e-6))
    return CodeTests(language, cases, sources, raw.get("entry_point"), tuple(names) if names else None, tolerance)


def _from_text(text: str, where: str) -> Any:
    if not text.lstrip().startswith(("{", "[")):
        return {"unit_tests": text}
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def _check_cases(cases: Sequence[Mapping[str, Any]], where: str) -> None:
    for index, case in enumerate(cases):
        program = isinstance(case, Mapping) and "stdout" in case
        call = isinstance(case, Mapping) and "call" in case and ("returns" in case) != ("raises" in case)
        if program == call or call != ("call" in cases[0]):
            raise ValueError(
                f"{where}: case {index}: want `stdin` and `stdout`, or `call` and one of `returns`, `raises`"
            )


def extract_program(text: str) -> str:
    """The last fenced block after the thinking, else all that stands there."""
    text = text.rpartition("</think>")[2]
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text.strip()


def _run_programs(program: str, tests: CodeTests, limits: Limits) -> list[bool]:
    language = language_named(tests.language)
    limits = _for_language(limits, language)
    commands = [Command(language.run, str(case.get("stdin", "")), limits) for case in tests.cases]
    if language.compile is not None:
        commands.insert(0, Command(language.compile, limits=_COMPILE, must_succeed=True))
    outcomes = run({language.file_name: program}, commands, readable=language.readable, disk_bytes=256 << 20)
    if language.compile is not None:
        outcomes = outcomes[1:]
    if len(outcomes) < len(tests.cases):
        return [False] * len(tests.cases)
    return [
        outcome.succeeded and same_output(outcome.stdout.decode("utf-8", "replace"), str(case["stdout"]))
        for case, outcome in zip(tests.cases, outcomes, strict=True)
    ]


def _for_language(limits: Limits, language: Language) -> Limits:
    return Limits(limits.seconds, limits.memory_bytes, limit_address_space=language.limit_address_space)


def same_output(got: str, wanted: str) -> bool:
    """Equal line by line, white space at the ends of lines and of the text aside."""
    return _lines(got) == _lines(wanted)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


@lru_cache(maxsize=1)
def _harness_files() -> tuple[str, ...]:
    """The grader's code that a jail may read, compiled where it is."""
    sources = [os.path.abspath(str(module.__file__)) for module in (rewards, code_harness, code_wire)]
    compiled = map(cache_from_source, sources)
    return (*sources, *filter(os.path.exists, compiled))


class _Candidate:
    """A program that serves calls in its jail."""

    def __init__(self, program: str, limits: Limits) -> None:
        requests, self.writes = os.pipe()
        self.reads, answers = os.pipe()
        command = Command(
            (*_PYTHON, "serve", str(requests), str(answers), "main.py"),
            limits=limits,
            keep_fds=(requests, answers),
        )
        try:
            self._jail = Jail({"main.py": program}, [command], readable=_harness_files())
        finally:
            os.close(requests)
            os.close(answers)
        self._jail.start()
        self._await_harness()

    def _await_harness(self) -> None:
        """The harness says that it is there before it loads the program: what fails earlier is not the program's fault.

        Raises:
            SandboxError: it does not say so in time.
        """
        said, deadline = b"", time.monotonic() + _START_SECONDS
        while not said.endswith(b"\n"):
            ready = select.select([self.reads], [], [], max(0.0, deadline - time.monotonic()))[0]
            data = os.read(self.reads, 1) if ready else b""  # not a byte of what the client will read
            if not data:
                self.close()
                raise SandboxError(f"code_tests: the sandbox did not bring up its harness within {_START_SECONDS:g} s")
            said += data

    def close(self) -> None:
        self.release()
        self._jail.kill()

    def release(self) -> None:
        """Closes this process's ends of the wire."""
        for descriptor in (self.reads, self.writes):
            if descriptor >= 0:
                os.close(descriptor)
        self.reads = self.writes = -1


def _run_calls(program: str, tests: CodeTests, limits: Limits) -> list[bool]:
    total = Limits(limits.seconds * (len(tests.cases) + 1), limits.memory_bytes)
    passed: list[bool] = []
    with closing(_Candidate(program, total)) as candidate:
        client = Client(Pipe(candidate.reads, candidate.writes), seconds=limits.seconds)
        try:
            client.names()
            for case in tests.cases:
                passed.append(_call_passes(client, case, tests.float_tolerance))
        except CandidateGone:  # a late answer must not pass for the next one's
            pass
        except Exception:  # whatever the program raised while it loaded
            assert not passed
    return passed + [False] * (len(tests.cases) - len(passed))


def _call_passes(client: Client, case: Mapping[str, Any], tolerance: float) -> bool:
    arguments = copy.deepcopy([list(case.get("args", ())), dict(case.get("kwargs", {}))])
    try:
        value = client.request("call", str(case["call"]), *arguments)
    except CandidateError as error:
        return "raises" in case and str(error).startswith(f"{case['raises']}:")
    except Exception as error:  # whatever the program raised
        return case.get("raises") in {kind.__name__ for kind in type(error).__mro__}
    return "returns" in case and same_value(value, case["returns"], tolerance)


def same_value(got: Any, wanted: Any, tolerance: float = 1e-6) -> bool:
    """`got == wanted` for plain data where `wanted` came from JSON: tuples equal lists, keys that are not text equal
    their text, floats match within a relative or absolute `tolerance`."""
    if isinstance(wanted, (list, tuple)):
        same_length = isinstance(got, (list, tuple)) and len(got) == len(wanted)
        return same_length and all(same_value(a, b, tolerance) for a, b in zip(got, wanted, strict=True))
    if isinstance(wanted, Mapping):
        if not isinstance(got, dict) or len(got) != len(wanted):
            return False
        named = {str(key): value for key, value in got.items()}
        return all(str(key) in named and same_value(named[str(key)], value, tolerance) for key, value in wanted.items())
    if isinstance(wanted, float) and isinstance(got, (int, float)):
        return math.isclose(got, wanted, rel_tol=tolerance, abs_tol=tolerance) or got == wanted
    return not isinstance(got, code_harness.Remote) and bool(got == wanted)


def _run_unit_tests(program: str, tests: CodeTests, limits: Limits) -> list[bool]:
    total = Limits(limits.seconds * _UNIT_TESTS_FACTOR, limits.memory_bytes)
    nonce = secrets.token_hex(16)
    order = {"nonce": nonce, "sources": tests.sources, "entry_point": tests.entry_point, "names": tests.names}
    with closing(_Candidate(program, total)) as candidate:
        ends = (candidate.reads, candidate.writes)
        argv = (*_PYTHON, "test", *map(str, ends))
        command = Command(argv, json.dumps(order), total, keep_fds=ends)
        with Jail({}, [command], readable=_harness_files()) as tester:
            candidate.release()
            outcome = tester.outcomes()[0]
    results = _results(outcome.stdout.decode("utf-8", "replace"), nonce)
    for text in results:
        if text.startswith("unsendable"):
            raise ValueError(f"code_tests: a unit test cannot be run against a program in another process: {text}")
    return [not text for text in results] if results else [False] * len(tests.sources)


def _results(output: str, nonce: str) -> list[str]:
    for line in output.splitlines():
        if line.startswith(nonce):
            return json.loads(line[len(nonce) :])
    return []
