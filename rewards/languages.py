"""Programming languages that `code_tests` can run here: how a program is compiled and started in the jail."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from rewards.sandbox.run import PYTHON


@dataclass(frozen=True, slots=True)
class Language:
    """How to run one language's programs. Paths are relative to the jail's working directory."""

    file_name: str
    compile: tuple[str, ...] | None
    run: tuple[str, ...]
    readable: tuple[str, ...] = ()
    """Paths outside the system directories that its tools need."""
    limit_address_space: bool = True


_NAMES = {
    "py": "python",
    "python3": "python",
    "c++": "cpp",
    "cc": "cpp",
    "js": "javascript",
    "node": "javascript",
    "rs": "rust",
}


def language_named(name: str) -> Language:
    """The language called `name`, in any usual spelling.

    Raises:
        ValueError: it is unknown, or its compiler is not on this machine.
    """
    key = _NAMES.get(name.lower(), name.lower())
    if key not in _FINDERS:
        raise ValueError(f"code_tests: unknown language {name!r}: it runs {', '.join(sorted(_FINDERS))}")
    found = available_languages().get(key)
    if found is None:
        raise ValueError(f"code_tests: no {key} on this machine: install its compiler or drop the domain's {key} tasks")
    return found


@lru_cache(maxsize=1)
def available_languages() -> Mapping[str, Language]:
    """What this machine can run, by name."""
    found = {name: find() for name, find in _FINDERS.items()}
    return {name: language for name, language in found.items() if language is not None}


def _system_tool(name: str) -> str | None:
    return shutil.which(name, path="/usr/local/bin:/usr/bin:/bin")


def _python() -> Language:
    return Language("main.py", None, (PYTHON, "-I", "-S", "-E", "-B", "-X", "utf8", "main.py"))


def _compiled(tool: str, file_name: str, *options: str) -> Language | None:
    path = _system_tool(tool)
    return (path and Language(file_name, (path, "-O1", *options, "-o", "main", file_name, "-lm"), ("./main",))) or None


def _node() -> Language | None:
    path = _system_tool("node")
    options = ("--max-old-space-size=256", "--single-threaded-gc", "--v8-pool-size=1")
    return (path and Language("main.js", None, (path, *options, "main.js"), limit_address_space=False)) or None


def _rust() -> Language | None:
    tool = shutil.which("rustc")
    if tool is None or _system_tool("cc") is None:
        return None
    answer = subprocess.run([tool, "--print", "sysroot"], capture_output=True, text=True, timeout=30, check=False)
    root = answer.stdout.strip()
    compiler = os.path.join(root, "bin", "rustc")
    if answer.returncode != 0 or not os.path.exists(compiler):
        return None
    return Language(
        "main.rs", (compiler, "-O", "-o", "main", "main.rs"), ("./main",), (root,), limit_address_space=False
    )


_FINDERS: Mapping[str, Callable[[], Language | None]] = {
    "python": _python,
    "c": lambda: _compiled("gcc", "main.c", "-std=c17"),
    "cpp": lambda: _compiled("g++", "main.cpp", "-std=c++17"),
    "javascript": _node,
    "rust": _rust,
}
