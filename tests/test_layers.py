"""Architecture as a test: imports point down only, and the heavy libraries stay in their files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ALLOWED = {
    "rollout": {"rollout"},
    "stability": {"stability"},
    "rewards": {"rewards", "rollout.types"},
    "grpo": {"grpo", "rollout", "rewards", "stability"},
    "specialists": {"specialists", "grpo", "rollout", "rewards"},
    "grpo/policy": {"grpo.policy", "stability"},
}
"""What each package, or a room of one, may import of ours: a package with all its modules, or one module."""

HOMES = {
    "ray": ("grpo/cluster", "grpo/commands/submit.py"),
    "vllm": ("rollout/engine.py", "rollout/vllm_plugin/"),
    "grpo.cli": ("grpo/cli.py",),
    "grpo.commands": ("grpo/cli.py", "grpo/commands/"),
}
"""The only files that may import these, as path prefixes."""

LIGHT = {
    "grpo/cli.py": {"torch", "ray", "vllm", "transformers", "pydantic", "numpy", "rich", "datasets"},
    "grpo/config.py": {"torch", "ray", "vllm", "transformers", "datasets"},
    "rollout/config.py": {"torch", "ray", "vllm", "transformers", "datasets"},
    "rewards/config.py": {"torch", "ray", "vllm", "transformers", "datasets"},
    "stability/config.py": {"torch", "ray", "vllm", "transformers", "datasets"},
}
"""What must not be imported when these modules are."""

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400


def sources() -> list[Path]:
    packages = {room.split("/")[0] for room in ALLOWED}
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module's full name, and whether the import stands at module level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top_level
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in top_level


def is_within(imported: str, module: str) -> bool:
    """Whether an import is of a module, or of something inside of it."""
    return imported == module or imported.startswith(f"{module}.")


def room_of(where: str) -> str:
    """The innermost room with a rule of its own."""
    return max((room for room in ALLOWED if where.startswith(f"{room}/")), key=len)


def forbidden(room: str, imported: str) -> bool:
    """Whether an import of ours points anywhere but down."""
    if imported.split(".")[0] not in ALLOWED:
        return False
    return not any(is_within(imported, allowed) for allowed in ALLOWED[room])


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path.relative_to(ROOT).as_posix())
    wrong = [name for name, _ in imports_of(path) if forbidden(room, name)]
    assert not wrong, f"{room} must not import {wrong}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_these_stay_home(path: Path) -> None:
    where = path.relative_to(ROOT).as_posix()
    for name, _ in imports_of(path):
        for module, home in HOMES.items():
            assert not is_within(name, module) or where.startswith(home), f"{where} imports {name}, at home in {home}"


@pytest.mark.parametrize("where", LIGHT)
def test_front_door_imports_nothing_heavy(where: str) -> None:
    wrong = [name for name, at_top in imports_of(ROOT / where) if at_top and name.split(".")[0] in LIGHT[where]]
    assert not wrong


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize(
    ("room", "imported", "wrong"),
    [
        ("rollout", "rewards.types.Answer", True),
        ("stability", "rollout.types.Task", True),
        ("rewards", "rollout.types.Task", False),
        ("rewards", "rollout.engine.Engine", True),
        ("rewards", "rollout.types_of_other.Task", True),
        ("grpo", "specialists.distill.run", True),
        ("specialists", "grpo.train.train", False),
        ("specialists", "stability.unbiased_kl.unbiased_kl", True),
        ("rollout", "numpy", False),
        (room_of("grpo/policy/layers/head.py"), "grpo.learner.Learner", True),
        (room_of("grpo/learner.py"), "grpo.policy.model.PolicyModel", False),
    ],
)
def test_the_rule_itself(room: str, imported: str, wrong: bool) -> None:
    assert forbidden(room, imported) is wrong
