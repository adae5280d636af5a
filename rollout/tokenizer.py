"""A task's prompt in, token ids out, and back: the only place where text becomes tokens.

Completions are never re-tokenised: `decode` is for rewards and people only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rollout.types import Task


class TokenizerError(ValueError):
    """A tokenizer that cannot do what the run file asks of it: the message names the field and the remedy."""


class TaskTokenizer:
    """The model's tokenizer with the run's way of making prompts."""

    def __init__(self, model_path: str | Path, *, system_prompt: str | None = None) -> None:
        """
        Raises:
            TokenizerError: the model has no tokenizer that can be loaded.
        """
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        self._model_path = str(model_path)
        self._system_prompt = system_prompt
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(self._model_path)
        except (OSError, ValueError, KeyError) as error:
            raise TokenizerError(
                f"model.path: {self._model_path!r} has no tokenizer that can be loaded ({error}): save one beside the "
                "weights"
            ) from error
        self._decodes_in_rust = (
            isinstance(self._tokenizer, PreTrainedTokenizerFast)
            and type(self._tokenizer)._decode is PreTrainedTokenizerFast._decode
            and not self._tokenizer.clean_up_tokenization_spaces
        )

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows, added tokens included; the model's embedding may be padded beyond it."""
        return len(self._tokenizer)

    def encode(self, task: Task) -> np.ndarray:  # int32 [P]
        """The prompt's token ids, ready for the first sampled token.

        Text goes in as it is (with the special tokens the tokenizer adds to text); chat messages, and text under a
        system prompt, go through the chat template, which opens the assistant's turn.

        Raises:
            TokenizerError: chat is needed and the tokenizer has no template, or the prompt has no tokens.
        """
        if isinstance(task.prompt, str) and self._system_prompt is None:
            token_ids = self._tokenizer(task.prompt)["input_ids"]
        else:
            token_ids = self._encode_chat(task)
        if not token_ids:
            raise TokenizerError(f"task {task.id}: the prompt has no tokens: {task.prompt!r}")
        return np.asarray(token_ids, np.int32)

    def _encode_chat(self, task: Task) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise TokenizerError(
                f"task {task.id}: the tokenizer of {self._model_path!r} has no chat template: give text prompts and no "
                "tasks.system_prompt, or save a chat_template.jinja beside the model"
            )
        own = (
            [{"role": "user", "content": task.prompt}]
            if isinstance(task.prompt, str)
            else [dict(m) for m in task.prompt]
        )
        system = [] if self._system_prompt is None else [{"role": "system", "content": self._system_prompt}]
        encoded = self._tokenizer.apply_chat_template(
            system + own, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return encoded["input_ids"]

    def decode(self, completions: Sequence[np.ndarray]) -> list[str]:
        """The texts of int32 [T] token ids each, special tokens left out. May be called from any thread."""
        rows = [token_ids.tolist() for token_ids in completions]
        if self._decodes_in_rust:  # by one call, which lets other threads run meanwhile
            return self._tokenizer.backend_tokenizer.decode_batch(rows, skip_special_tokens=True)
        return [self._tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def stop_token_ids(self, stop: Sequence[str] = ()) -> tuple[int, ...]:
        """The ids that end a completion: every end-of-sequence id of the model and its tokenizer, then each stop
        string's.

        Raises:
            TokenizerError: a stop string is not one token, or there is nothing that could end a completion.
        """
        ids = dict.fromkeys(self._eos_token_ids())
        for text in stop:
            token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(token_ids) != 1 or token_ids[0] == self._tokenizer.unk_token_id:
                raise TokenizerError(
                    f"sampling.stop: {text!r} is {len(token_ids)} tokens of this tokenizer, want exactly one it knows: "
                    "choose a single-token string, or end answers with the end-of-sequence token"
                )
            ids[token_ids[0]] = None
        if not ids:
            raise TokenizerError(
                f"model.path: {self._model_path!r} names no end-of-sequence token, so every answer would run to "
                f"max_new_tokens: set "
                "eos_token in its tokenizer_config.json, or give sampling.stop"
            )
        return tuple(ids)

    def _eos_token_ids(self) -> list[int]:
        """From generation_config.json where there is one, and from the tokenizer."""
        from transformers import GenerationConfig

        found: list[int] = []
        try:
            eos = GenerationConfig.from_pretrained(self._model_path).eos_token_id
        except OSError:  # the file is optional
            eos = None
        if eos is not None:
            found.extend([eos] if isinstance(eos, int) else eos)
        if self._tokenizer.eos_token_id is not None:
            found.append(self._tokenizer.eos_token_id)
        return found
