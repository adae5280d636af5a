"""1 for a completion in the asked form, 0 otherwise: thinking, answer, tool calls. Usually a gate for other rewards.

    <think> anything, not empty </think>
    <tool_call> {"name": "search", "arguments": {"query": "..."}} </tool_call>      any number
    the answer, not empty; inside <answer> ... </answer> where asked for

Each part is judged on its own and shown in the breakdown: `thinking`, `answer`, `tool_calls`, each 0 or 1; the reward
is their product. The tags must be ordinary tokens of the tokenizer: special ones are gone from the decoded text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from rewards.types import Answer, RewardResult
from rollout.types import Task

_CALL_OPEN, _CALL_CLOSE = "<tool_call>", "</tool_call>"


def format_tags(
    task: Task,
    answer: Answer,
    *,
    thinking: Literal["required", "optional", "forbidden"] = "required",
    opened_by_prompt: bool = False,
    answer_tags: bool = False,
    tool_calls: Literal["required", "optional", "forbidden"] = "optional",
    tools_key: str = "tools",
) -> RewardResult:
    """Judges the form of one completion; see the module's text.

    Args:
        thinking: one `<think>...</think>` at the very start.
        opened_by_prompt: the chat template ends in `<think>`, so the completion only closes it.
        answer_tags: the answer stands in one `<answer>...</answer>` that nothing follows.
        tool_calls: each must be one JSON object of a `name` and an object of `arguments`. A completion that calls a
            tool needs no answer.
        tools_key: the task field with the tools there are (OpenAI's form, or names); a call of another tool, or without
            a required argument, is malformed. Without the field any name will do.

    Raises:
        ValueError: one of the three words is none of those allowed.
    """
    for name, value in (("thinking", thinking), ("tool_calls", tool_calls)):
        if value not in ("required", "optional", "forbidden"):
            raise ValueError(f"format_tags: {name}={value!r}: want required, optional or forbidden")
    thinks, rest = _thinking(answer.text, thinking, opened_by_prompt)
    calls, rest, num_calls = _tool_calls(rest, tool_calls, _tools(task.fields.get(tools_key)))
    answers = _answer(rest, answer_tags) or (num_calls > 0 and not rest.strip())
    parts = {"thinking": float(thinks), "answer": float(answers), "tool_calls": float(calls)}
    return RewardResult(float(thinks and answers and calls), parts)


def _thinking(text: str, wanted: str, opened: bool) -> tuple[bool, str]:
    """Whether the thinking is well-formed, and what comes after it."""
    opens, closes = text.count("<think>"), text.count("</think>")
    if opens == 0 and closes == 0 and not opened:
        return wanted != "required", text
    inside, _, rest = text.partition("</think>")
    head = inside.lstrip()
    starts = opened or head.startswith("<think>")
    sound = closes == 1 and opens == int(not opened) and starts and bool(head.removeprefix("<think>").strip())
    return sound and wanted != "forbidden", rest if closes else ""


def _answer(text: str, tags: bool) -> bool:
    if not tags:
        return bool(text.strip()) and "<answer>" not in text and "</answer>" not in text
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return False
    before, _, rest = text.partition("<answer>")
    inside, closed, after = rest.partition("</answer>")
    return bool(closed) and not before.strip() and not after.strip() and bool(inside.strip())


def _tool_calls(text: str, wanted: str, tools: Mapping[str, frozenset[str]] | None) -> tuple[bool, str, int]:
    """Whether the calls are well-formed, the text without them, and their number."""
    kept, sound, count = [], True, 0
    while _CALL_OPEN in text:
        before, _, text = text.partition(_CALL_OPEN)
        kept.append(before)
        body, closed, text = text.partition(_CALL_CLOSE)
        sound = sound and bool(closed) and _is_call(body, tools)
        count += 1
    rest = "".join([*kept, text])
    sound = sound and _CALL_CLOSE not in rest
    return sound and not (wanted == "required" and not count) and not (wanted == "forbidden" and count), rest, count


def _is_call(body: str, tools: Mapping[str, frozenset[str]] | None) -> bool:
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return False
    name, arguments = call["name"], call["arguments"]
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return False
    return tools is None or (name in tools and tools[name] <= set(arguments))


def _tools(field: Any) -> Mapping[str, frozenset[str]] | None:
    """Name -> required arguments."""
    if isinstance(field, str):
        field = json.loads(field)
    if field is None:
        return None
    tools: dict[str, frozenset[str]] = {}
    for tool in field:
        if isinstance(tool, str):
            tools[tool] = frozenset()
            continue
        function = tool.get("function", tool)
        tools[function["name"]] = frozenset((function.get("parameters") or {}).get("required", ()))
    return tools
