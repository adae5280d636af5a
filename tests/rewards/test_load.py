"""Rewards by name: found, checked, and refused with a remedy."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from rewards.config import RewardConfig
from rewards.exact_match import exact_match
from rewards.load import RewardError, load_reward, load_rewards

SOURCE = """
import functools
from dataclasses import dataclass
from pathlib import Path

@dataclass
class Settings:
    bonus: float = 0.5

limit = 3

def plain(task, answer):
    return 1.0

def with_arguments(task, answer, *, scale, shift=0.0):
    return scale

async def later(task, answer):
    return 1.0

def no_task(answer):
    return 1.0

def other_names(prompt, completions):
    return [1.0]

def swapped(answer, task):
    return 1.0

def for_group(task, answers, *, folder: Path = Path("."), sizes: tuple[int, ...] = ()):
    return [1.0 for _ in answers]

def anything(task, answer, **options):
    return 1.0

def typed(task, answer, *, scale: float = 1.0):
    return scale

def wrapper(*args, **kwargs):
    return 1.0


partial_later = functools.partial(later)

class AsyncJudge:
    async def __call__(self, task, answer):
        return 0.5

async_judge = AsyncJudge()

class Judge:
    def __call__(self, task, answer):
        return 0.5

judge = Judge()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    return tmp_path


def test_by_module_name(tmp_path: Path) -> None:
    reward = load_reward(RewardConfig(fn="rewards.exact_match:exact_match", weight=2), base_dir=tmp_path)
    assert (reward.fn, reward.name, reward.weight, reward.kwargs) == (exact_match, "exact_match", 2, {})


def test_by_file_beside_the_run_file(folder: Path) -> None:
    config = RewardConfig(fn="./mine.py:with_arguments", name="mine", kwargs={"scale": 2.0})
    reward = load_reward(config, base_dir=folder)
    assert reward.name == "mine" and reward.fn(None, None, **reward.kwargs) == 2.0


def test_one_file_is_run_once(folder: Path) -> None:
    first = load_reward(RewardConfig(fn="./mine.py:plain"), base_dir=folder)
    second = load_reward(RewardConfig(fn="mine.py:later"), base_dir=folder)
    assert first.fn.__globals__ is second.fn.__globals__  # pyright: ignore[reportFunctionMemberAccess]
    assert inspect.iscoroutinefunction(second.fn)


def test_callable_object(folder: Path) -> None:
    assert load_reward(RewardConfig(fn="./mine.py:judge"), base_dir=folder).fn(None, None) == 0.5


@pytest.mark.parametrize(
    ("fn", "kwargs", "message"),
    [
        ("mine.py", {}, r"write it as package\.module:function"),
        ("./none.py:f", {}, r"no file .*none\.py"),
        ("./mine.py:plian", {}, r"has no 'plian'; it has .*plain"),
        ("./mine.py:limit", {}, r"'limit' is int, want a function"),
        ("./mine.py:plain", {"scale": 1}, r"kwargs\.scale: unknown argument; it takes no arguments"),
        ("./mine.py:with_arguments", {}, r"kwargs\.scale is missing .* set it in the run file"),
        ("./mine.py:with_arguments", {"scale": 1, "shft": 2}, r"kwargs\.shft: unknown argument; it takes scale, shift"),
        ("./mine.py:typed", {"scale": "two"}, r"kwargs\.scale = 'two': .*valid number"),
        ("./mine.py:other_names", {}, r"call its first two parameters task and answer \(or answers\)"),
        ("./mine.py:swapped", {}, r"call its first two parameters task and answer"),
        ("./mine.py:wrapper", {}, r"a decorator needs functools\.wraps"),
        ("./mine.py:no_task", {}, r"signature is \(answer\)"),
        ("./broken.py:f", {}, r"broken\.py failed: ZeroDivisionError"),
        ("no_such_package.rewards:f", {}, r"no module 'no_such_package'.*install the package"),
    ],
)
def test_mistakes_are_named_with_a_remedy(folder: Path, fn: str, kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load_reward(RewardConfig(fn=fn, kwargs=kwargs), base_dir=folder)


@pytest.mark.parametrize(
    ("name", "per_group", "is_async"),
    [
        ("plain", False, False),
        ("later", False, True),
        ("partial_later", False, True),
        ("judge", False, False),
        ("async_judge", False, True),
        ("for_group", True, False),
    ],
)
def test_the_form_is_recognised(folder: Path, name: str, per_group: bool, is_async: bool) -> None:
    spec = load_reward(RewardConfig(fn=f"./mine.py:{name}"), base_dir=folder).spec
    assert (spec.per_group, spec.is_async) == (per_group, is_async)


def test_arguments_are_read_as_their_types(folder: Path) -> None:
    given = {"folder": "/tmp", "sizes": [1, 2]}
    reward = load_reward(RewardConfig(fn="./mine.py:for_group", kwargs=given), base_dir=folder)
    assert reward.kwargs == {"folder": Path("/tmp"), "sizes": (1, 2)}


def test_a_function_that_takes_anything_gets_anything(folder: Path) -> None:
    assert load_reward(RewardConfig(fn="./mine.py:anything", kwargs={"x": 1}), base_dir=folder).kwargs == {"x": 1}


def test_entries_that_make_the_same_calls_share_a_key(folder: Path) -> None:
    def key(**settings: object) -> str:
        return load_reward(RewardConfig.model_validate({"fn": "./mine.py:typed"} | settings), base_dir=folder).spec.key

    assert key() == key(weight=3, name="other", gate=True)
    assert len({key(), key(kwargs={"scale": 2}), key(timeout_s=1)}) == 3


def test_two_rewards_of_one_name_are_refused(folder: Path) -> None:
    twice = (RewardConfig(fn="./mine.py:plain"), RewardConfig(fn="./mine.py:later", name="plain"))
    with pytest.raises(RewardError, match="two entries are called 'plain'"):
        load_rewards(twice, base_dir=folder)
