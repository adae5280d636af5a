"""Programs against their tests, honest ones and ones that attack the grader."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import pytest

from rewards.code_tests import code_tests, extract_program, same_output, same_value
from rewards.languages import available_languages
from rewards.sandbox import run as sandbox
from rewards.sandbox.run import Isolation, SandboxError
from tests.rewards.cases import said, task

SUM_CASES = {"cases": [{"stdin": "2 3\n", "stdout": "5\n"}, {"stdin": "20 30\n", "stdout": "50"}]}
ADD_CALLS = [{"call": "add", "args": [2, 3], "returns": 5}, {"call": "add", "args": ["a", "b"], "returns": "ab"}]
ADD_TESTS = {"unit_tests": ["assert add(2, 3) == 5", "assert add([1], [2]) == [1, 2]"]}
ADD = "def add(a, b):\n    return a + b\n"


def grade(program: str, tests: Any, **kwargs: Any) -> float:
    return code_tests(task(tests=tests), said(textwrap.dedent(program)), **kwargs)


def test_program_is_the_last_fenced_block_after_the_thinking() -> None:
    text = "<think>```python\nno\n```</think>First\n```\nold\n```\nthen\n```python\nnew\n\nlast\n```\nDone."
    assert extract_program(text) == "new\n\nlast\n"
    assert extract_program("<think>x</think>  print(1)\n") == "print(1)"
    assert extract_program("```python\ncut off") == "```python\ncut off"


@pytest.mark.parametrize(
    ("program", "reward"),
    [
        ("print(sum(map(int, input().split())))", 1.0),
        ("print(*[sum(map(int, input().split()))], '  ')\nprint()", 1.0),
        ("print(5)", 0.0),
        ("print(sum(map(int, input().split()))); raise SystemExit(1)", 0.0),
        ("import os; os._exit(0)", 0.0),
        ("print(", 0.0),
        ("", 0.0),
    ],
)
def test_stdin_cases(program: str, reward: float) -> None:
    assert grade(program, SUM_CASES) == reward


def test_share_of_cases_passed() -> None:
    assert grade("print(5)", SUM_CASES, partial=True) == 0.5
    assert grade("def add(a, b): return 5", ADD_CALLS, partial=True) == 0.5
    assert grade("def add(a, b): return 5", ADD_TESTS, partial=True) == 0.5


def test_cases_as_a_json_column() -> None:
    assert grade("print(sum(map(int, input().split())))", json.dumps(SUM_CASES)) == 1.0
    assert grade(ADD, json.dumps(ADD_CALLS)) == 1.0
    assert grade(ADD, "assert add(1, 1) == 2") == 1.0


def test_slow_program_fails_its_case_alone() -> None:
    program = "n = int(input())\nwhile n: pass\nprint(n)"
    tests = [{"stdin": "0", "stdout": "0"}, {"stdin": "1", "stdout": "1"}, {"stdin": "0", "stdout": "0"}]
    assert grade(program, tests, partial=True, seconds=0.5) == pytest.approx(2 / 3)


PROGRAMS = {
    "c": '#include <stdio.h>\nint main() { int a, b; scanf("%d %d", &a, &b); printf("%d\\n", a + b); }',
    "cpp": "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }",
    "javascript": 'const [a, b] = require("fs").readFileSync(0, "utf8").split(" ").map(Number); console.log(a + b)',
    "rust": "fn main() { let mut s = String::new(); std::io::stdin().read_line(&mut s).unwrap();"
    ' println!("{}", s.split_whitespace().map(|x| x.parse::<i32>().unwrap()).sum::<i32>()) }',
}


@pytest.mark.parametrize("language", PROGRAMS)
def test_other_languages(language: str) -> None:
    if language not in available_languages():
        with pytest.raises(ValueError, match=f"no {language} on this machine"):
            grade(PROGRAMS[language], {**SUM_CASES, "language": language})
        pytest.skip(f"no {language} on this machine")
    assert grade(PROGRAMS[language], {**SUM_CASES, "language": language}, seconds=10) == 1.0
    assert grade(PROGRAMS[language].replace("a + b", "a - b").replace("sum", "product"),
                 {**SUM_CASES, "language": language}, seconds=10) == 0.0  # fmt: skip


def test_program_that_does_not_compile() -> None:
    if "c" not in available_languages():
        pytest.skip("no c on this machine")
    assert grade("int main() { return x; }", {**SUM_CASES, "language": "c"}) == 0.0


@pytest.mark.parametrize(
    "tests", [[{"call": "f", "returns": 1}], {"unit_tests": "assert f() == 1"}], ids=["calls", "unit tests"]
)
def test_a_harness_that_does_not_start_is_not_the_programs_fault(tests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.code_tests._harness_files", lambda: ())
    with pytest.raises(SandboxError, match="did not bring up its harness"):
        grade("def f(): return 1", tests)


def test_calls() -> None:
    program = """
    class Solution:
        def div(self, a, b): return a / b
        def pair(self): return (1, [2], {3: None})
    def scaled(x, *, by): return x * by
    class Odd(Exception): pass
    def odd(): raise Odd("no")
    """
    calls = [
        {"call": "Solution.div", "args": [1, 3], "returns": 0.3333333333},
        {"call": "Solution.div", "args": [1, 0], "raises": "ZeroDivisionError"},
        {"call": "Solution.div", "args": [1, 0], "raises": "ArithmeticError"},
        {"call": "Solution.pair", "returns": [1, [2], {"3": None}]},
        {"call": "scaled", "args": [2], "kwargs": {"by": 3}, "returns": 6},
        {"call": "odd", "raises": "Odd"},
    ]
    assert grade(program, calls) == 1.0
    wrong = [{**call, "raises": "KeyError"} if "raises" in call else {**call, "returns": 7} for call in calls]
    assert grade(program, wrong, partial=True) == 0.0


def test_arguments_of_the_data_set_are_not_changed() -> None:
    calls = [{"call": "f", "args": [[2, 1]], "returns": None}]
    assert grade("def f(x): x.sort()", calls) == 1.0
    assert calls == [{"call": "f", "args": [[2, 1]], "returns": None}]


UNIT_TESTS = {
    "check": {"unit_tests": "def check(candidate):\n    assert candidate(2, 3) == 5", "entry_point": "add"},
    "import": {"unit_tests": "from solution import add\nassert add(2, 3) == 5"},
    "unittest": {
        "unit_tests": "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
        "        self.assertEqual(add(2, 3), 5)\n"
        "        with self.assertRaises(TypeError):\n            add(1, None)"
    },
    "function": {"unit_tests": "def test_add():\n    assert add(2, 3) == 5"},
    "standard module": {"unit_tests": "assert math.isclose(add(0.1, 0.2), 0.3)"},
    "types": {"unit_tests": "assert add((1,), (2,)) == (1, 2) and type(add(1, 2)) is int and add(b'a', b'b') == b'ab'"},
    "big": {"unit_tests": "assert add(10**5000, 1) == 10**5000 + 1 and add(1e308, 1e308) == float('inf')"},
    "function as an argument": {"unit_tests": "assert list(map(add, [1], [2])) == [3]"},
}


@pytest.mark.parametrize("name", UNIT_TESTS)
def test_unit_tests(name: str) -> None:
    assert grade(ADD, UNIT_TESTS[name]) == 1.0
    assert grade(ADD.replace("+", "- 1 if a == 1 else 0 *"), UNIT_TESTS[name]) == 0.0


def test_objects_and_changes_in_place_cross_the_wire() -> None:
    program = """
    class Node:
        def __init__(self, value): self.value, self.next = value, None
        def __len__(self): return 1 + (len(self.next) if self.next else 0)
    def sort(items): items.sort()
    def last(node): return last(node.next) if node.next else node
    """
    tests = """
    from solution import Node
    a, b = Node(1), Node(2)
    a.next = b
    assert len(a) == 2 and last(a).value == 2 and a.next.value == 2
    x = [3, 1, 2]
    sort(x)
    assert x == [1, 2, 3]
    """
    assert grade(program, {"unit_tests": textwrap.dedent(tests)}) == 1.0


def test_a_test_that_cannot_cross_the_wire_is_the_data_sets_mistake() -> None:
    with pytest.raises(ValueError, match="unit test cannot be run"):
        grade("def apply(f): return f()", {"unit_tests": "assert apply(lambda: 1) == 1"})


ATTACKS = {
    "exit before the tests": "import os\nos._exit(0)",
    "exit politely": "raise SystemExit(0)",
    "exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "equal to everything": "class E:\n    def __eq__(self, other): return True\ndef add(a, b): return E()",
    "an int equal to everything": "class E(int):\n    def __eq__(self, other): return True\ndef add(a, b): return E(7)",
    "a list equal to everything": "class E(list):\n    def __eq__(self, other): return True\ndef add(a, b): return E()",
    "patched builtins": "import builtins\nbuiltins.all = builtins.bool = lambda *a: True\ndef add(a, b): return 0",
    "patched grader": """
        import sys
        for module in list(sys.modules.values()):
            for name in ("same_value", "run_tests", "_run_source", "_call_passes", "decode", "_reply"):
                if hasattr(module, name):
                    setattr(module, name, lambda *a, **k: "")
        def add(a, b): return 0
        """,
    "patched frames": """
        import sys
        frame = sys._getframe()
        while frame:
            for key in list(frame.f_globals):
                if key in ("encode", "_answer"):
                    frame.f_globals[key] = lambda *a, **k: {"value": True}
            frame = frame.f_back
        def add(a, b): return 0
        """,
    "forged messages": """
        import os
        for fd in range(3, 40):
            for text in (b'{"value": ["add"]}\\n', b'{"value": 5}\\n', b'[""]\\n'):
                try: os.write(fd, text)
                except OSError: pass
        def add(a, b): return 0
        """,
    "reading the expected answers": """
        import os, gc, sys
        found = []
        for fd in range(3, 40):
            try:
                os.set_blocking(fd, False)
                found.append(os.read(fd, 1 << 20))
            except OSError: pass
        for folder, _, names in os.walk("/tmp"):
            for name in names: found.append(open(os.path.join(folder, name), "rb").read())
        def add(a, b):
            needle = str(271000 + 801).encode()
            text = b"".join(found) + repr([o for o in gc.get_objects() if isinstance(o, (dict, list))]).encode()
            return int(needle) if needle in text else 0
        """,
    "not JSON": """
        import os
        for fd in range(3, 40):
            try: os.write(fd, b"[" * 100000 + b"\\n")
            except OSError: pass
        """,
    "a flood": "def add(a, b): return 'x' * (20 << 20)",
    "hanging": "def add(a, b):\n    while True: pass",
    "a new name for a builtin": "def print(*a): pass\ndef abs(x): return 271801\ndef add(a, b): return 0",
    "the string of an assertion": "def add(a, b): raise AssertionError('passed')",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_on_the_grader(name: str) -> None:
    calls = [{"call": "add", "args": [271000, 801], "returns": 271801}]
    tests = {"unit_tests": "assert abs(add(271000, 801)) == 271801"}
    assert grade(ATTACKS[name], calls, seconds=1.0) == 0.0
    assert grade(ATTACKS[name], tests, seconds=0.2) == 0.0
    assert grade(ATTACKS[name], [{"stdin": "", "stdout": "271801"}], seconds=1.0) == 0.0


def test_the_attack_that_reads_answers_finds_what_there_is_to_find() -> None:
    calls = [{"call": "add", "args": [271801, 0], "returns": 271801}]
    assert grade(ATTACKS["reading the expected answers"], calls) == 1.0


def test_a_dead_program_does_not_pass_for_one_that_raises() -> None:
    program = "import os\ndef add(a, b): os._exit(0)"
    swallowing = "try:\n    add(1, 2)\nexcept Exception:\n    pass\nelse:\n    assert False"
    assert grade(program, {"unit_tests": swallowing}) == 0.0
    assert grade("def add(a, b): raise KeyError", {"unit_tests": swallowing}) == 1.0


def test_helpers_of_the_test_come_from_the_program_only_if_named() -> None:
    program = "def close(a, b): return True\ndef root(x): return 0"
    tests = "def close(a, b): return abs(a - b) < 1e-9\nassert close(root(4), 2)"
    assert grade(program, {"unit_tests": tests}) == 0.0
    assert grade(program, {"unit_tests": "assert close(root(4), 2)", "entry_point": "root"}) == 0.0
    assert grade(program, {"unit_tests": "assert close(root(4), 2)", "names": ["root", "close"]}) == 1.0


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, "no tests"),
        ({}, "one of them and not empty"),
        ([{"stdin": "1"}], "case 0: want `stdin` and `stdout`"),
        ([{"call": "f", "returns": 1, "raises": "E"}], "one of `returns`, `raises`"),
        ([{"call": "f", "returns": 1}, {"stdout": "1"}], "case 1"),
        ("{no json", "not JSON"),
        ({"cases": [{"stdout": "1"}], "language": "cobol"}, "unknown language 'cobol'"),
        ({"unit_tests": "x", "language": "c"}, "unit tests are for Python"),
    ],
)
def test_malformed_tests_are_named(tests: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grade("print(1)", tests)


def test_isolation_weaker_than_asked_is_refused() -> None:
    if sandbox.strongest_isolation() is Isolation.NAMESPACES:
        assert grade(ADD, ADD_CALLS, isolation="namespaces") == 1.0
    else:
        with pytest.raises(SandboxError, match="the entry asks for namespaces"):
            grade(ADD, ADD_CALLS, isolation="namespaces")


def test_comparisons() -> None:
    assert same_output("a  \nb\n\n", "a\nb") and not same_output("a b", "a  b") and not same_output("", "0")
    assert same_value((1, [2.0000001]), [1, [2.0]]) and same_value({1: 2}, {"1": 2}) and same_value(None, None)
    assert not same_value([1], [1, 2]) and not same_value("1", 1) and not same_value({1: 2}, {"1": 3})
    assert not same_value(2.1, 2.0) and same_value(float("inf"), float("inf")) and not same_value([1], "1")
