"""Rewards by name: found, checked, and refused with a remedy."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from rewards.config import RewardConfig
from rewards.exact_match import exact_match
from rewards.load import RewardError, load_reward, load_rewards

SOURCE = """
from dataclasses import dataclass

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
        ("./mine.py:plain", {"scale": 1}, r"called as \(task, answer, scale=\.\.\.\).*unexpected keyword"),
        ("./mine.py:with_arguments", {}, r"missing a required.*'scale'"),
        ("./mine.py:no_task", {}, r"signature is \(answer\)"),
        ("./broken.py:f", {}, r"broken\.py failed: ZeroDivisionError"),
        ("no_such_package.rewards:f", {}, r"no module 'no_such_package'.*install the package"),
    ],
)
def test_mistakes_are_named_with_a_remedy(folder: Path, fn: str, kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load_reward(RewardConfig(fn=fn, kwargs=kwargs), base_dir=folder)


def test_two_rewards_of_one_name_are_refused(folder: Path) -> None:
    twice = (RewardConfig(fn="./mine.py:plain"), RewardConfig(fn="./mine.py:later", name="plain"))
    with pytest.raises(RewardError, match="two entries are called 'plain'"):
        load_rewards(twice, base_dir=folder)
