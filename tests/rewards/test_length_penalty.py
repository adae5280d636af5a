"""Length penalties against hand-computed numbers."""

from __future__ import annotations

import pytest

from rewards.length_penalty import group_length_penalty, length_penalty
from rollout.types import FinishReason
from tests.rewards.cases import said, task


@pytest.mark.parametrize(
    ("tokens", "reward"), [(0, 0.0), (60, 0.0), (61, -0.025), (80, -0.5), (100, -1.0), (101, -1.0), (10_000, -1.0)]
)
def test_soft_overlong_zone(tokens: int, reward: float) -> None:
    assert length_penalty(task(), said("", tokens), max_tokens=100, soft_tokens=40) == pytest.approx(reward)


def test_a_truncated_completion_gets_the_full_penalty() -> None:
    cut = said("", 10, FinishReason.LENGTH)
    assert length_penalty(task(), cut, max_tokens=100, soft_tokens=40) == -1.0


@pytest.mark.parametrize(("maximum", "soft"), [(100, 0), (100, 101), (0, 0)])
def test_impossible_zones_are_refused(maximum: int, soft: int) -> None:
    with pytest.raises(ValueError, match="want 0 < soft_tokens <= max_tokens"):
        length_penalty(task(), said("", 1), max_tokens=maximum, soft_tokens=soft)


def test_relative_to_the_group() -> None:
    answers = [said("", tokens) for tokens in (100, 200, 150, 120)]
    assert group_length_penalty(task(), answers) == pytest.approx([0.0, -0.5, 0.0, 0.0])
    assert group_length_penalty(task(), answers, reward_short=True) == pytest.approx([0.5, -0.5, 0.0, 0.3])


def test_groups_of_one_length_get_nothing() -> None:
    same = [said("", 7), said("", 7)]
    assert group_length_penalty(task(), same, reward_short=True) == [0.0, 0.0]
    assert group_length_penalty(task(), [], reward_short=True) == []
    assert group_length_penalty(task(), [said("", 7), said("", 9)], min_spread=3) == [0.0, 0.0]
