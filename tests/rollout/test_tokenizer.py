"""Prompts into token ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rollout.tokenizer import TaskTokenizer, TokenizerError
from rollout.types import Task
from tests.grpo.test_preflight import save_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture
def chat_folder(folder: Path) -> Path:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_text_goes_in_as_it_is(folder: Path) -> None:
    tokenizer = TaskTokenizer(folder)
    token_ids = tokenizer.encode(Task("t", "d", "a b"))
    assert token_ids.dtype == np.int32 and tokenizer.decode([token_ids]) == ["a b"]
    ended = np.array([*token_ids, 1], np.int32)
    assert tokenizer.decode([ended, token_ids[:1]]) == ["a b", "a"]  # the end token is left out


@pytest.mark.parametrize(
    ("prompt", "system_prompt", "expected"),
    [
        (({"role": "user", "content": "hi"},), None, "u:hi\na:"),
        (({"role": "user", "content": "hi"},), "be brief", "s:be brief\nu:hi\na:"),
        ("hi", "be brief", "s:be brief\nu:hi\na:"),
        ("hi", None, "hi"),
    ],
)
def test_chat_goes_through_the_template(
    chat_folder: Path, prompt: str, system_prompt: str | None, expected: str
) -> None:
    tokenizer = TaskTokenizer(chat_folder, system_prompt=system_prompt)
    assert tokenizer.decode([tokenizer.encode(Task("t", "d", prompt))]) == [expected]


def test_chat_without_a_template_is_refused(folder: Path) -> None:
    with pytest.raises(TokenizerError, match=r"task t: .*no chat template"):
        TaskTokenizer(folder).encode(Task("t", "d", ({"role": "user", "content": "hi"},)))


def test_stop_ids_come_from_model_tokenizer_and_run_file(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 1]}))
    assert TaskTokenizer(folder).stop_token_ids(("a", "\n")) == (5, 1, ord("a") - 32 + 3, 98)


def test_nothing_to_stop_at_is_refused(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match="would run to max_new_tokens"):
        TaskTokenizer(folder).stop_token_ids()


def test_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer that can be loaded"):
        TaskTokenizer(tmp_path)
