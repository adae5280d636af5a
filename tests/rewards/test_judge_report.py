"""The agreement report: measures against published and hand-computed values, and the file it reads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo.judge import report
from rewards.judge.client import JudgeError
from rewards.judge.report import (
    Item,
    Verdict,
    krippendorff_alpha,
    measure,
    read_items,
    render,
    spearman,
    weighted_kappa,
)
from rewards.judge.schema import RubricError, Scores, read_rubric
from rewards.types import Abstain
from rollout.types import Task
from tests.rewards.judge_cases import CRITERIA, FAST, TASK, answer
from tests.rewards.scripted_endpoint import Body, Step, completion, scripted, seen, verdict

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: four observers, twelve units.
OBSERVERS = [
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
]


def test_alpha_of_the_published_example() -> None:
    columns = zip(*(row.split() for row in OBSERVERS), strict=True)
    units = [[float(value) for value in column if value != "."] for column in columns]
    assert krippendorff_alpha([unit for unit in units if len(unit) > 1]) == pytest.approx(0.849, abs=5e-4)


def test_alpha_at_its_landmarks() -> None:
    assert krippendorff_alpha([[1, 1], [2, 2], [5, 5]]) == 1.0
    # two units that swap 0 and 1: D_o = 1, D_e = 8 ordered pairs of 12 at distance 1 = 2/3
    assert krippendorff_alpha([[0, 1], [1, 0]]) == pytest.approx(1 - 1 / (2 / 3))
    assert math.isnan(krippendorff_alpha([[3, 3], [3, 3]])) and math.isnan(krippendorff_alpha([]))


def test_spearman_with_ties_by_hand() -> None:
    # ranks 0, 1.5, 1.5, 3 and 0, 2, 1, 3: covariance 4.5, variances 4.5 and 5
    assert spearman(np.array([1, 2, 2, 4]), np.array([1, 3, 2, 4])) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(np.array([1, 2, 3]), np.array([9, 5, 1])) == pytest.approx(-1)
    assert math.isnan(spearman(np.array([1, 1]), np.array([1, 2]))) and math.isnan(spearman(np.empty(0), np.empty(0)))


def test_kappa_by_hand() -> None:
    # two classes: 3 of 4 agree, 1/2 by chance
    assert weighted_kappa(np.array([1.0, 0, 1, 1]), np.array([1.0, 0, 0, 1])) == pytest.approx(0.5)
    assert weighted_kappa(np.array([0.0, 1]), np.array([1.0, 0])) == pytest.approx(-1)
    assert math.isnan(weighted_kappa(np.ones(3), np.ones(3)))


def scores(accuracy: int, clarity: int, *, flagged: bool = False) -> Scores:
    rubric = read_rubric(TASK)
    normalised = {"accuracy": accuracy / 10, "clarity": (clarity - 1) / 4}
    total = 0.0 if flagged else rubric.total(normalised)
    return Scores({"accuracy": accuracy, "clarity": clarity}, normalised, flagged, total)


def test_rows_by_hand() -> None:
    items = [Item(TASK, answer("a"), {"accuracy": 0.8, "total": 0.9}), Item(TASK, answer("b"), {"accuracy": 0.1})]
    verdicts: Sequence[Sequence[Verdict]] = [
        [scores(8, 5), scores(8, 5), scores(6, 5)],
        [scores(2, 1), Abstain("no verdict"), scores(4, 1, flagged=True)],
    ]
    result = measure(items, verdicts)
    row = result.rows["accuracy"]
    assert (row.items, row.labelled) == (2, 2)
    assert row.exact == pytest.approx((1 / 3 + 0) / 2)  # one of three pairs; none of one
    assert row.difference == pytest.approx(((0 + 0.2 + 0.2) / 3 + 0.2) / 2)
    assert (row.accuracy, row.error) == (0.5, pytest.approx((0.0 + 0.1) / 2))
    assert row.spearman == pytest.approx(1.0)
    assert row.kappa == pytest.approx(1 - 0.01 / ((0 + 0.7**2 + 0.6**2 + 0.1**2) / 2))
    total = result.rows["total"]
    assert (total.labelled, total.accuracy) == (1, 1.0)
    assert total.error == pytest.approx(abs((3 * 0.8 + 1) / 4 - 0.9))
    assert math.isnan(result.rows["clarity"].accuracy) and result.rows["clarity"].alpha == 1.0
    assert (result.judgements, result.abstentions, result.manipulation) == (6, {"no verdict": 1}, 0.2)


def test_table_and_json_say_the_same() -> None:
    result = measure([Item(TASK, answer(), {})], [[scores(8, 5), scores(6, 5)]])
    table = [line.split() for line in render(result).splitlines()]
    assert table[0] == ["items", "exact", "difference", "alpha", "labelled", "accuracy", "error", "spearman", "kappa"]
    assert table[1] == ["accuracy", "1", "0.000", "0.200", "0.000", "0", "-", "-", "-", "-"]
    row = json.loads(json.dumps(result.to_json(), allow_nan=False))["rows"]["accuracy"]
    assert row["difference"] == pytest.approx(0.2) and row["kappa"] is None


def test_report_on_a_file_past_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def by_length(number: int, body: Body) -> Step:
        """Steady on short completions, at odds with itself on `wobbly`, without a verdict on `mute`."""
        text, seed = seen(body, "ANSWER"), body["seed"]
        if text == "mute":
            return completion("?")
        return verdict({"accuracy": len(text) + (seed if text == "wobbly" else 0), "clarity": 3})

    rows: list[dict[str, Any]] = [
        {"prompt": "p", "rubric": CRITERIA, "completion": "ab", "labels": {"accuracy": 2, "clarity": 3}},
        {"prompt": "p", "rubric": CRITERIA, "completion": "wobbly", "label": 0.25},
        {"prompt": "p", "rubric": CRITERIA, "completion": "mute"},
    ]
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    access = FAST.model_copy(update={"cache": str(tmp_path / "cache.sqlite"), "attempts": 2})
    with scripted(by_length) as endpoint:
        result = report(file, endpoint=endpoint.url, model="m", repeats=3, access=access)
    assert len(endpoint.bodies) == 3 + 3 + 3 * 2
    assert result["judgements"] == 9 and sum(result["abstentions"].values()) == 3
    accuracy = result["rows"]["accuracy"]
    assert accuracy["exact"] == pytest.approx((1 + 0) / 2)
    assert accuracy["difference"] == pytest.approx((0 + (0.1 + 0.2 + 0.1) / 3) / 2)
    assert (accuracy["labelled"], accuracy["accuracy"]) == (1, 1.0)
    assert result["rows"]["total"]["labelled"] == 2  # one from its criteria, one given
    printed = capsys.readouterr().out.splitlines()
    assert "judgements 9, abstentions 3, flagged 0.000" in printed
    assert json.loads(printed[-1]) == result


def test_report_without_an_endpoint_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps({"prompt": "p", "rubric": CRITERIA, "completion": "x"}) + "\n")
    with (
        scripted(Step(401, body="who are you?")) as endpoint,
        pytest.raises(JudgeError, match=r"HTTP 401: who"),
    ):
        report(file, endpoint=endpoint.url, model="m", access=FAST)


def test_json_goes_to_a_file_where_one_is_named(tmp_path: Path) -> None:
    file, output = tmp_path / "items.jsonl", tmp_path / "out.json"
    file.write_text(json.dumps({"prompt": "p", "rubric": CRITERIA, "completion": "x"}) + "\n")
    with scripted(verdict({"accuracy": 1, "clarity": 1})) as endpoint:
        result = report(file, endpoint=endpoint.url, model="m", access=FAST, output=output)
    assert json.loads(output.read_text()) == result


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, 'column "completion" is None'),
        ({"completion": "x", "label": 1.5}, "label is 1.5: want a number from 0 to 1"),
        ({"completion": "x", "labels": {"accuracy": 11}}, "labels.accuracy is 11: want a number from 0 to 10"),
        ({"completion": "x", "labels": {"tone": 1}}, "labels.tone: its rubric has no criterion"),
        ({"completion": "x", "labels": 3}, 'column "labels" is 3'),
    ],
)
def test_wrong_rows_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RubricError, match=f"task t: .*{message}"):
        read_items([Task("t", "d", "p", fields={"rubric": CRITERIA, **fields})])
