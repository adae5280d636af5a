"""The share of a completion's text that is in the asked language, by py3langid (a model of 4 MB that it brings along).

    reward = letters of the pieces in the language / letters of the pieces whose language is clear

A piece is a sentence, cut where the writing changes between Latin, Cyrillic, Chinese and so on; pieces too short to
judge are joined with their neighbours of the same writing. Fenced and inline code, formulas, links, tags, quoted lines
and quotations are left out. A piece whose language is not clear (probability below 0.5 among `languages`) does not
count. A completion with fewer than `min_letters` letters in clear pieces scores 1: nothing speaks against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from rewards.types import Abstain, Answer
from rollout.types import Task

_LANGUAGES = (
    *("ar", "bg", "ca", "cs", "da", "de", "el", "en", "es", "et", "fa", "fi", "fr", "he", "hi", "hr", "hu", "id", "it"),
    *("ja", "ko", "lt", "lv", "nl", "no", "pl", "pt", "ro", "ru", "sk", "sl", "sr", "sv", "th", "tr", "uk", "vi", "zh"),
)
_LEFT_OUT = re.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`"  # code
    r"|\$\$.*?\$\$|\\\[.{0,2000}?\\\]|\\\(.{0,2000}?\\\)|(?<!\\)\$[^$\n]+\$"
    r"|\\begin\{(\w+\*?)\}.{0,4000}?\\end\{\1\}|\\[a-zA-Z]+(?:\{[^{}]*\})*"
    r"|<[^<>\n]{1,80}>|https?://\S+|^[ \t]*>.*$"  # tags, links, quoted lines
    r'|"[^"\n]{1,300}"|“[^”\n]{1,300}”|\u2018[^\u2019\n]{1,300}\u2019|\u2039[^\u203a\n]{1,300}\u203a'
    r"|«[^»\n]{1,300}»|„[^“”\n]{1,300}[“”]|「[^」\n]{1,300}」|『[^』\n]{1,300}』",
    re.DOTALL | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+|[。\uff01\uff1f\uff1b\uff1a]|\n+")
_SCRIPTS = {
    "east": re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"),
    "cyrillic": re.compile(r"[\u0400-\u052f]"),
    "greek": re.compile(r"[\u0370-\u03ff]{2}"),
    "semitic": re.compile(r"[\u0590-\u06ff]"),
    "indic": re.compile(r"[\u0900-\u0eff]"),
}
_RUN = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\s,\u3001\uff0c]+|[\u0400-\u052f\s,'\u2019-]+|[\u0370-\u03ff\u1f00-\u1fff\s,'\u2019-]+"
    r"|[\u0590-\u06ff\s,،-]+|[\u0900-\u0eff\s,-]+|[A-Za-z\u00c0-\u024f\u1e00-\u1eff\s,'\u2019-]+"
)
_ENOUGH_LETTERS, _ENOUGH_EAST_LETTERS = 24, 2
_CLEAR = 0.5
_MAX_CHARS = 100_000


def language_consistency(
    task: Task,
    answer: Answer,
    *,
    language: str = "prompt",
    language_key: str = "language",
    languages: Sequence[str] = _LANGUAGES,
    min_letters: int = 20,
) -> float:
    """The share in [0, 1]; see the module's text. Only the first 100,000 characters are looked at.

    Args:
        language: an ISO 639-1 code, or `prompt` for the language of the prompt (of its last user message).
        language_key: a task field that, where present, names the language and overrides `language`.
        languages: the languages to tell apart; fewer are told apart better.
        min_letters: a completion with fewer scores 1.

    Raises:
        Abstain: the prompt's language is asked for and not clear; name the language in the entry or in the tasks.
        ValueError: the language is none of `languages`, or the identifier does not know one of them.
    """
    wanted = task.fields.get(language_key) or language
    if wanted == "prompt":
        wanted = _prompt_language(task, tuple(languages))
    if wanted not in languages:
        raise ValueError(f"language_consistency: {wanted!r} is none of its languages {', '.join(languages)}")
    shares = language_shares(answer.text[:_MAX_CHARS], languages)
    clear = sum(shares.values())
    return 1.0 if clear < min_letters else shares.get(wanted, 0) / clear


def language_shares(text: str, languages: Sequence[str] = _LANGUAGES) -> Mapping[str, int]:
    """Letters by language, over the pieces of `text` whose language is clear."""
    identifier = _identifier(tuple(languages))
    shares: dict[str, int] = {}
    for piece in _pieces(_LEFT_OUT.sub("\n", text)):
        found, probability = identifier.classify(piece)
        if probability >= _CLEAR:
            shares[found] = shares.get(found, 0) + _letters(piece)
    return shares


@lru_cache(maxsize=8)
def _identifier(languages: tuple[str, ...]) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(languages)
    return identifier


def _prompt_language(task: Task, languages: tuple[str, ...]) -> str:
    text = task.prompt
    if not isinstance(text, str):
        said = [message["content"] for message in text if message.get("role") == "user"]
        text = said[-1] if said and isinstance(said[-1], str) else ""
    shares = language_shares(text[:_MAX_CHARS], languages)
    if not shares:
        raise Abstain(f"language_consistency: the language of task {task.id}'s prompt is not clear: set language")
    return max(shares, key=lambda name: shares[name])


def _letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def _pieces(text: str) -> Iterator[str]:
    """Stretches of one writing, each long enough to judge where there is enough text."""
    waiting: dict[str, str] = {}
    for sentence in _SENTENCE_END.split(text):
        for run in _RUN.findall(sentence):
            script = next((name for name, pattern in _SCRIPTS.items() if pattern.search(run)), "latin")
            piece = f"{waiting.pop(script, '')} {run.strip()}".strip()
            if _letters(piece) >= (_ENOUGH_EAST_LETTERS if script == "east" else _ENOUGH_LETTERS):
                yield piece
            elif piece:
                waiting[script] = piece
    yield from waiting.values()
