"""Comparisons: both orders, length, lost pairs, and the arithmetic by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from rewards.judge.client import JudgeError
from rewards.judge.compare import judge_pair, win_rate
from rewards.judge.schema import Better, Preferences, read_rubric
from rewards.rubric_judge import ring_pairs, rubric_compare
from rewards.types import Abstain, RewardResult
from tests.rewards.judge_cases import FAST, TASK, answer
from tests.rewards.scripted_endpoint import Body, Endpoint, Script, Step, completion, preference, scripted, seen

F, S, T = Better.FIRST, Better.SECOND, Better.TIE
RUBRIC = read_rubric(TASK)


def compare(script: Script | Step, texts: Sequence[str], *, opponents: int = 9) -> tuple[list[RewardResult], Endpoint]:
    with scripted(script) as endpoint:
        call = rubric_compare(
            TASK, [answer(t) for t in texts], endpoint=endpoint.url, model="m", opponents=opponents, access=FAST
        )
        results = asyncio.run(call)
    assert all(isinstance(result, RewardResult) for result in results), results
    return [result for result in results if isinstance(result, RewardResult)], endpoint


def by_quality(number: int, body: Body) -> Step:
    """Prefers the higher digit for accuracy; clarity is always a tie."""
    first, second = int(seen(body, "FIRST")), int(seen(body, "SECOND"))
    return preference({"accuracy": "first" if first > second else "second", "clarity": "tie"})


def test_win_rates_by_hand() -> None:
    results, endpoint = compare(by_quality, ["3", "1", "2"])
    # accuracy (weight 3): 2 of 2, 0 of 2, 1 of 2 pairs won; clarity (weight 1): ties
    assert [r.parts["accuracy"] for r in results] == [1.0, 0.0, 0.5]
    assert [r.value for r in results] == pytest.approx([3.5 / 4, 0.5 / 4, 2 / 4])
    assert [r.parts["position_flips"] for r in results] == [0, 0, 0]
    orders = sorted((seen(body, "FIRST"), seen(body, "SECOND")) for body in endpoint.bodies)
    assert orders == [("1", "2"), ("1", "3"), ("2", "1"), ("2", "3"), ("3", "1"), ("3", "2")]


@pytest.mark.parametrize("place", ["first", "second"])
def test_judge_that_prefers_a_place_says_nothing(place: str) -> None:
    results, _ = compare(preference({"accuracy": place, "clarity": place}), ["a", "b", "c", "d"])
    assert [r.value for r in results] == [0.5] * 4
    assert [r.parts["position_flips"] for r in results] == [1.0] * 4


def test_longer_answer_has_to_win_both_orders() -> None:
    def longer_when_first(number: int, body: Body) -> Step:
        better = "first" if len(seen(body, "FIRST")) > len(seen(body, "SECOND")) else "tie"
        return preference({"accuracy": better, "clarity": better})

    results, _ = compare(longer_when_first, ["x" * 126, "y" * 100])
    assert [r.value for r in results] == [0.5, 0.5]
    results, _ = compare(longer_when_first, ["x" * 125, "y" * 100])
    assert [r.value for r in results] == [0.75, 0.25]


def test_judge_that_prefers_length_is_shown_up() -> None:
    def longest(number: int, body: Body) -> Step:
        better = "first" if len(seen(body, "FIRST")) > len(seen(body, "SECOND")) else "second"
        return preference({"accuracy": better, "clarity": better})

    results, _ = compare(longest, ["x" * 400, "y" * 200, "z" * 100])
    assert [r.parts["longer_won"] for r in results] == [1.0, 1.0, 1.0]


def test_equal_texts_tie_without_a_request() -> None:
    results, endpoint = compare(by_quality, ["7", "7"])
    assert [r.value for r in results] == [0.5, 0.5] and not endpoint.bodies


@pytest.mark.parametrize(
    ("forward", "backward", "value"),
    [(F, S, 1.0), (S, F, 0.0), (T, T, 0.5), (F, F, 0.5), (S, S, 0.5), (F, T, 0.75), (T, S, 0.75), (T, F, 0.25)],
)
def test_orders_are_averaged(forward: Better, backward: Better, value: float) -> None:
    verdicts = (Preferences({"a": forward}, (False, False)), Preferences({"a": backward}, (False, False)))
    pair = judge_pair((4, 2), (10, 10), *verdicts)
    assert pair.values == {"a": value}
    assert pair.flips == float(forward == backward != T)


def test_one_flag_loses_that_verdict_only() -> None:
    better = {"accuracy": F, "clarity": F}
    forward = Preferences(better, (True, False))  # flags answer 0, which it prefers
    backward = Preferences({"accuracy": S, "clarity": S}, (False, False))  # prefers answer 0
    pair = judge_pair((0, 1), (5, 5), forward, backward)
    assert pair.values == {"accuracy": 0.5, "clarity": 0.5} and pair.flags == (1, 0)
    result = win_rate(0, [pair], RUBRIC)
    assert isinstance(result, RewardResult)
    assert (result.value, result.parts["manipulation"]) == (0.5, 0.5), "half of its verdicts is not more than half"


def test_lost_pair_does_not_lose_the_group() -> None:
    def refuses_c(number: int, body: Body) -> Step:
        if "9" in (seen(body, "FIRST"), seen(body, "SECOND")):
            return completion(None, refusal="no")
        return by_quality(number, body)

    with scripted(refuses_c) as endpoint:
        answers = [answer("3"), answer("1"), answer("9")]
        results = asyncio.run(rubric_compare(TASK, answers, endpoint=endpoint.url, model="m", access=FAST))
    assert isinstance(results[2], Abstain)
    assert [r.value for r in results[:2] if isinstance(r, RewardResult)] == pytest.approx([3.5 / 4, 0.5 / 4])


def test_endpoint_that_is_down_is_an_error() -> None:
    with scripted(Step(503)) as endpoint, pytest.raises(JudgeError, match="HTTP 503"):
        call = rubric_compare(TASK, [answer("1"), answer("2")], endpoint=endpoint.url, model="m", access=FAST)
        asyncio.run(call)


@pytest.mark.parametrize(
    ("size", "opponents", "meets"), [(8, 2, 2), (8, 3, 4), (8, 4, 4), (8, 7, 7), (5, 9, 4), (2, 4, 1)]
)
def test_everyone_meets_as_many_opponents(size: int, opponents: int, meets: int) -> None:
    pairs = ring_pairs(size, opponents)
    assert len(set(pairs)) == len(pairs)
    assert [sum(i in pair for pair in pairs) for i in range(size)] == [meets] * size


def test_no_opponents_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one other"):
        ring_pairs(4, 0)
