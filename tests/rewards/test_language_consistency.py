"""Language shares on real text."""

from __future__ import annotations

import time
from typing import Any

import pytest

from rewards.language_consistency import language_consistency, language_shares
from rewards.types import Abstain
from tests.rewards.cases import said, task

ENGLISH = "We need to find the total number of apples that the two children have together in the end."
GERMAN = "Zuerst berechnen wir die Summe der beiden Zahlen, danach teilen wir das Ergebnis durch zwei."
FRENCH = "Nous devons d'abord calculer la somme des deux nombres avant de diviser le tout par deux."
SPANISH = "Primero tenemos que sumar los dos números y después dividir el resultado entre dos."
CHINESE = "我们首先需要计算两个数字的总和然后把结果除以二最后得到答案。"
RUSSIAN = "Сначала нам нужно найти сумму двух чисел и затем разделить результат на два."
JAPANESE = "まず二つの数の合計を計算して、それから結果を二で割ります。"
ALL = {"en": ENGLISH, "de": GERMAN, "fr": FRENCH, "es": SPANISH, "zh": CHINESE, "ru": RUSSIAN, "ja": JAPANESE}


def share(text: str, language: str = "en", **kwargs: Any) -> float:
    return language_consistency(task(), said(text), language=language, **kwargs)


@pytest.mark.parametrize("language", ALL)
def test_each_language_is_told_from_the_others(language: str) -> None:
    for other, text in ALL.items():
        assert share(text, language) == (other == language)


def test_share_is_by_letters() -> None:
    letters = {name: sum(map(str.isalpha, text)) for name, text in ALL.items()}
    mixed = f"{ENGLISH}\n{GERMAN}\n{ENGLISH}"
    expected = 2 * letters["en"] / (2 * letters["en"] + letters["de"])
    assert share(mixed) == pytest.approx(expected)
    assert language_shares(mixed) == {"en": 2 * letters["en"], "de": letters["de"]}


def test_a_switch_within_a_sentence_is_seen_where_the_writing_changes() -> None:
    text = "First we compute the sum of the two numbers 然后把结果除以二 and then we are done with all of it."
    assert 0.8 < share(text) < 1.0
    assert share(text, "zh") == pytest.approx(1 - share(text))


@pytest.mark.parametrize(
    "foreign",
    [
        f"```\n{GERMAN}\n```",
        f"```python\n# {GERMAN}",
        "`das ist wirklich eine lange Zeile auf Deutsch`",
        f"> {GERMAN}",
        f'He said: "{GERMAN}"',
        f"\N{LEFT DOUBLE QUOTATION MARK}{CHINESE}\N{RIGHT DOUBLE QUOTATION MARK}",
        f"\N{LEFT SINGLE QUOTATION MARK}{GERMAN}\N{RIGHT SINGLE QUOTATION MARK}",
        f"\\begin{{align*}}\nx &= 1 \\text{{{GERMAN}}}\n\\end{{align*}}",
        r"\[ \text{wenn die Summe der beiden Zahlen gerade ist und sonst nicht} \]",
        r"$\text{wenn die Summe der beiden Zahlen gerade ist und sonst nicht}$",
        "https://beispiel.example/das/ist/eine/lange/adresse/mit/deutschen/woertern",
    ],
)
def test_code_formulas_and_quotations_are_left_out(foreign: str) -> None:
    assert share(f"{ENGLISH}\n\n{foreign}") == 1.0


@pytest.mark.parametrize(
    "repeated", ["\\[", "\\(", "\\begin{a}", "$", "```", '"', "<", "\N{DOUBLE LOW-9 QUOTATION MARK}", "\u7684a"]
)
def test_a_completion_that_repeats_itself_is_judged_in_time(repeated: str) -> None:
    started = time.monotonic()
    share(repeated * (100_000 // len(repeated)))
    assert time.monotonic() - started < 10


def test_short_text_counts_as_consistent() -> None:
    assert share("42") == 1.0 and share("") == 1.0 and share("x = 3, y = 4") == 1.0 and share("Ja.") == 1.0
    assert share(GERMAN, min_letters=1000) == 1.0


def test_language_of_the_prompt() -> None:
    assert language_consistency(task(prompt=GERMAN), said(GERMAN)) == 1.0
    assert language_consistency(task(prompt=GERMAN), said(ENGLISH)) == 0.0
    chat = task(prompt=({"role": "system", "content": ENGLISH}, {"role": "user", "content": FRENCH}))  # pyright: ignore
    assert language_consistency(chat, said(FRENCH)) == 1.0 and language_consistency(chat, said(ENGLISH)) == 0.0


def test_unclear_prompt_is_an_abstention() -> None:
    with pytest.raises(Abstain, match="set language"):
        language_consistency(task(prompt="12+30="), said(ENGLISH))


def test_a_tasks_own_language_comes_first() -> None:
    assert language_consistency(task(language="de"), said(GERMAN), language="en") == 1.0


def test_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match="'tlh' is none of its languages"):
        share(ENGLISH, "tlh")
