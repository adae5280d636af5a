"""The pages that state facts about the code state today's."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
METRIC_PREFIXES = "train|reward|rollout|mismatch|parity|learner|time|eval"


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate_configuration", DOCS / "generate_configuration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_up_to_date() -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert page == _generator().render(), "run: python docs/generate_configuration.py"


def test_every_metric_is_explained() -> None:
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    missing = sorted(key for key in _metric_keys() if f"`{key}`" not in page)
    assert not missing, f"docs/metrics.md does not explain {missing}"


def _metric_keys() -> set[str]:
    """Metric names written out in the code of `grpo`, up to a part that is filled in at run time."""
    keys = set()
    for name in ("train.py", "records/step_metrics.py", "evaluate.py"):
        for node in ast.walk(ast.parse((ROOT / "grpo" / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                keys |= set(re.findall(rf"^(?:{METRIC_PREFIXES})/[a-z_0-9]+$", node.value))
    return keys


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    rooms = "grpo|rollout|rewards|stability|specialists|tests|benchmarks|docs|examples"
    named = re.findall(rf"`((?:{rooms})/(?:[\w/.-]+\.\w+|[\w/-]*/|))`", text)
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [name for name in linked if not (DOCS / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    """Claims point at tests as `tests/stability/test_x.py::test_name`, or as `test_name` alone."""
    text = page.read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in re.findall(r"\b(test_\w+)\b(?!\.py)", text) if f"def {name}(" not in sources]
    assert not missing
