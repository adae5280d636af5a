"""Verdicts on pairs of answers, each judged in both orders, in; a score per answer out.

Position bias: a pair is judged as (a, b) and as (b, a). Per criterion an order gives a 1 (better), 0.5 (tie) or 0, and
the two are averaged, so that a judge that always prefers the first answer says 0.5 of every pair.

Verbosity bias: on top of the instruction not to reward length, a longer answer has to win in both orders. Where it is
longer by more than `LONGER_BY` and its average is above 0.5 but not 1, the criterion is a tie.

Manipulation: an answer that the judge flags loses every criterion of that verdict to an answer that it does not flag,
and one that is flagged in more than half of its verdicts scores 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from rewards.judge.schema import Better, Preferences, Rubric
from rewards.types import Abstain, RewardResult

LONGER_BY = 1.25
"""Lengths in characters within this ratio count as equal."""
_POINTS = {Better.FIRST: 1.0, Better.TIE: 0.5, Better.SECOND: 0.0}


@dataclass(frozen=True, slots=True)
class PairVerdict:
    """Two answers compared in both orders, seen from the first of them."""

    first: int
    second: int
    values: Mapping[str, float]
    """By criterion id: 1 the first is better, 0 the second, 0.25, 0.5 and 0.75 what lies between."""
    flips: float
    """Share of the criteria on which one order says the opposite of the other."""
    flags: tuple[int, int]
    """In how many of the two verdicts each answer was flagged as manipulation."""
    longer: int | None
    """The index of the longer answer, None where the lengths count as equal."""


def identical_pair(first: int, second: int, rubric: Rubric) -> PairVerdict:
    """Equal texts tie without being judged."""
    return PairVerdict(first, second, {c.id: 0.5 for c in rubric.criteria}, 0.0, (0, 0), None)


def judge_pair(
    pair: tuple[int, int], lengths: tuple[int, int], forward: Preferences, backward: Preferences
) -> PairVerdict:
    """Joins the verdicts of both orders.

    Args:
        pair: the answers' indices (a, b).
        lengths: of their texts, in characters.
        forward: the verdict on (a, b).
        backward: the verdict on (b, a).
    """
    ahead = _points(forward)
    back = {name: 1.0 - value for name, value in _points(backward).items()}
    longer = _longer(pair, lengths)
    values = {name: _discount((ahead[name] + back[name]) / 2, pair, longer) for name in ahead}
    flips = fmean(abs(ahead[name] - back[name]) == 1.0 for name in ahead)
    flags = (
        forward.manipulation[0] + backward.manipulation[1],
        forward.manipulation[1] + backward.manipulation[0],
    )
    return PairVerdict(*pair, values, flips, flags, longer)


def _points(verdict: Preferences) -> dict[str, float]:
    """What the answer seen first gets on each criterion."""
    first, second = verdict.manipulation
    if first != second:
        return dict.fromkeys(verdict.better, 0.0 if first else 1.0)
    return {name: _POINTS[better] for name, better in verdict.better.items()}


def _longer(pair: tuple[int, int], lengths: tuple[int, int]) -> int | None:
    if max(lengths) <= LONGER_BY * min(lengths):
        return None
    return pair[0] if lengths[0] > lengths[1] else pair[1]


def _discount(value: float, pair: tuple[int, int], longer: int | None) -> float:
    """A tie where the longer answer did not win in both orders."""
    for_first = pair[0] == longer and 0.5 < value < 1.0
    for_second = pair[1] == longer and 0.0 < value < 0.5
    return 0.5 if for_first or for_second else value


def win_rate(index: int, pairs: Iterable[PairVerdict], rubric: Rubric) -> RewardResult | Abstain:
    """The score of one answer: its mean over the pairs it stands in of the weighted mean over criteria, in [0, 1].

    Parts: the mean per criterion, `manipulation` (share of its verdicts that flag it), `position_flips`, and
    `longer_won` (of its pairs that were won, and whose lengths differ, the share won by the longer answer) where there
    are such pairs.
    """
    own = [pair for pair in pairs if index in (pair.first, pair.second)]
    if not own:
        return Abstain("no comparison with another answer could be judged")
    values = [pair.values if pair.first == index else _mirrored(pair.values) for pair in own]
    parts = {c.id: fmean(value[c.id] for value in values) for c in rubric.criteria}
    manipulation = sum(pair.flags[pair.second == index] for pair in own) / (2 * len(own))
    total = 0.0 if manipulation > 0.5 else rubric.total(parts)
    parts |= {"manipulation": manipulation, "position_flips": fmean(pair.flips for pair in own)}
    won_by_longer = [won for pair in own if (won := _longer_won(pair, rubric)) is not None]
    if won_by_longer:
        parts["longer_won"] = fmean(won_by_longer)
    return RewardResult(total, parts)


def _mirrored(values: Mapping[str, float]) -> dict[str, float]:
    return {name: 1.0 - value for name, value in values.items()}


def _longer_won(pair: PairVerdict, rubric: Rubric) -> bool | None:
    """Whether the longer answer won; None where neither won or neither is longer."""
    value = rubric.total(pair.values)
    if pair.longer is None or math.isclose(value, 0.5):
        return None
    return (pair.first if value > 0.5 else pair.second) == pair.longer
