"""Thinking, answer and tool-call structure."""

from __future__ import annotations

from typing import Any

import pytest

from rewards.format_tags import format_tags
from tests.rewards.cases import said, task

THOUGHT = "<think>hm</think>"
CALL = '<tool_call>{"name": "search", "arguments": {"query": "x"}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"required": ["query"]}}}


def judge(text: str, fields: dict[str, Any] | None = None, **kwargs: Any) -> tuple[float, float, float, float]:
    result = format_tags(task(**(fields or {})), said(text), **kwargs)
    return result.value, result.parts["thinking"], result.parts["answer"], result.parts["tool_calls"]


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        (THOUGHT + "yes", 1, 1),
        ("\n<think>\nhm\n</think>\n\nyes\n", 1, 1),
        (THOUGHT, 1, 0),
        ("yes", 0, 1),
        ("<think></think>yes", 0, 1),
        ("<think>  \n</think>yes", 0, 1),
        ("<think>hm", 0, 0),
        ("hm</think>yes", 0, 1),
        ("so: " + THOUGHT + "yes", 0, 1),
        (THOUGHT + THOUGHT + "yes", 0, 1),
        (THOUGHT + "yes</think>", 0, 1),
        (THOUGHT + "<answer>yes</answer>", 1, 0),
    ],
)
def test_thinking(text: str, thinking: int, answer: int) -> None:
    assert judge(text) == (thinking * answer, thinking, answer, 1)


def test_thinking_opened_by_the_prompt_forbidden_or_optional() -> None:
    assert judge("hm</think>yes", opened_by_prompt=True)[0] == 1
    assert judge(THOUGHT + "yes", opened_by_prompt=True)[0] == 0
    assert judge("no end", opened_by_prompt=True)[0] == 0
    assert judge("yes", thinking="forbidden")[0] == 1 and judge(THOUGHT + "yes", thinking="forbidden")[0] == 0
    assert judge("yes", thinking="optional")[0] == 1 and judge("</think>yes", thinking="optional")[0] == 0


@pytest.mark.parametrize(
    ("rest", "answer"),
    [("<answer>7</answer>", 1), ("\n<answer>7</answer>\n", 1), ("7", 0), ("<answer> </answer>", 0), ("<answer>7", 0),
     ("so <answer>7</answer>", 0), ("<answer>7</answer> bye", 0), ("<answer>7</answer><answer>8</answer>", 0),
     ("</answer>7<answer>", 0)],
)  # fmt: skip
def test_answer_tags(rest: str, answer: int) -> None:
    assert judge(THOUGHT + rest, answer_tags=True) == (answer, 1, answer, 1)


@pytest.mark.parametrize(
    "body",
    ["", "search", "[1]", '{"name": "search"}', '{"name": 7, "arguments": {}}', '{"name": "", "arguments": {}}',
     '{"name": "search", "arguments": "x"}', '{"name": "search", "arguments": {}, "id": 1}', "{'name': 'search'}",
     '{"name": "search", "arguments": {}} and', "[" * 100_000],
)  # fmt: skip
def test_malformed_calls(body: str) -> None:
    assert judge(f"{THOUGHT}<tool_call>{body}</tool_call>")[3] == 0


def test_calls() -> None:
    assert judge(THOUGHT + CALL) == (1, 1, 1, 1)
    assert judge(THOUGHT + CALL + "\n" + CALL + "done") == (1, 1, 1, 1)
    assert judge(THOUGHT + CALL[:-1])[3] == 0 and judge(THOUGHT + "</tool_call>" + CALL)[3] == 0
    assert judge(THOUGHT + "yes", tool_calls="required") == (0, 1, 1, 0)
    assert judge(THOUGHT + CALL, tool_calls="forbidden") == (0, 1, 1, 0)


@pytest.mark.parametrize("tools", [[TOOL], ["search"], [TOOL["function"]], '["search"]'])
def test_calls_of_given_tools(tools: Any) -> None:
    assert judge(THOUGHT + CALL, {"tools": tools})[3] == 1
    assert judge(THOUGHT + CALL.replace("search", "delete"), {"tools": tools})[3] == 0


def test_required_arguments() -> None:
    assert judge(THOUGHT + CALL.replace("query", "q"), {"tools": [TOOL]})[3] == 0


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="thinking='yes': want required, optional or forbidden"):
        format_tags(task(), said("x"), thinking="yes")  # pyright: ignore[reportArgumentType]
