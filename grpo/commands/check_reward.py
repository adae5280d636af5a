"""`keel check-reward`: a reward function and some tasks in, its scores, its speed and every breach of the contract out.

The function runs as in a training run: in a process of its own, with its timeout. Each group of completions is judged
twice, so that a function that does not claim to be random can be held to it.
"""

from __future__ import annotations

import asyncio
import random
import string
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.config import ConfigError
from grpo.records.metrics import read_rows
from rewards.config import RewardConfig
from rewards.load import RewardSpec, load_reward
from rewards.outcome import ABSTAINED, Outcome
from rewards.pool import RewardPool
from rewards.runner import RewardWorker
from rewards.score import make_answer
from rewards.types import Answer
from rollout.config import TasksConfig
from rollout.tasks import load_tasks
from rollout.types import FinishReason, Task

SLOW_SYNC_S = 1.0
"""A synchronous function whose median call takes longer holds up its whole worker."""
SLOW_SHARE = 0.5
"""A median call longer than this share of the timeout: some calls will not make it."""
CHARACTERS_PER_TOKEN = 4
"""Completions of this command have no tokens; this is how their number is guessed."""
SHOWN_SAMPLES = 16
RANDOM_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion for one task, and what it is: `reference`, `empty`, `random` or `given`."""

    task: Task
    kind: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class Judged:
    """A sample and the outcomes of two calls."""

    sample: Sample
    first: Outcome
    second: Outcome


@dataclass(frozen=True, slots=True)
class Violation:
    """A breach of the contract: what, how often, where first."""

    what: str
    times: int
    example: str
    detail: str = ""


def check_reward(
    fn: str,
    *,
    tasks: Path,
    completions: Path | None = None,
    kwargs: Sequence[str] = (),
    num_tasks: int = 20,
    timeout_s: float = 30.0,
    may_vary: bool = False,
) -> bool:
    """Judges, prints, and says whether the function keeps the contract.

    Args:
        fn: as `rewards.fn`; relative to the working directory.
        completions: a `.jsonl` file of `{"id" or "prompt": ..., "completion": ...}`; without one, each task's reference
            answer, an empty and a random text are judged.
        kwargs: `key=value`, read as TOML or else as text.
        may_vary: the function claims no determinism.

    Raises:
        ConfigError, TaskError, RewardError: the arguments or the function cannot be used.
    """
    config = _reward_config(fn, kwargs, timeout_s)
    spec = load_reward(config, base_dir=Path.cwd()).spec
    all_tasks = load_tasks(str(tasks), TasksConfig(train=str(tasks)), base_dir=Path.cwd())
    groups = _given(completions, all_tasks) if completions is not None else _generated(all_tasks[:num_tasks])
    judged = asyncio.run(_judge(spec, groups))
    violations = list(find_violations(spec, judged, may_vary=may_vary))
    _print(spec, judged, violations)
    return not violations


def find_violations(spec: RewardSpec, judged: Sequence[Judged], *, may_vary: bool) -> Iterator[Violation]:
    """Every breach of the contract that the calls show."""
    yield from _failures(judged)
    mutated = [j for j in judged if j.first.mutated or j.second.mutated]
    if mutated:
        yield Violation("changes its task or answer", len(mutated), mutated[0].sample.task.id)
    varied = [j for j in judged if _verdict(j.first) != _verdict(j.second)]
    if varied and not may_vary:
        detail = f"{_said(varied[0].first)}, then {_said(varied[0].second)}; --may-vary if that is meant"
        yield Violation("differs from one call to the next", len(varied), varied[0].sample.task.id, detail)
    yield from _slowness(spec, judged)


def _failures(judged: Sequence[Judged]) -> Iterator[Violation]:
    failed = [(j, outcome) for j in judged for outcome in (j.first, j.second) if outcome.cause not in ("", ABSTAINED)]
    for cause, times in Counter(outcome.cause for _, outcome in failed).most_common():
        j, outcome = next(pair for pair in failed if pair[1].cause == cause)
        yield Violation(cause, times, f"{j.sample.task.id} ({j.sample.kind})", outcome.detail)


def _slowness(spec: RewardSpec, judged: Sequence[Judged]) -> Iterator[Violation]:
    seconds = _seconds(judged)
    if not len(seconds):
        return
    median, limit = float(np.median(seconds)), spec.config.timeout_s
    slowest = max(judged, key=lambda j: j.first.seconds).sample.task.id
    if median > SLOW_SHARE * limit:
        yield Violation("too slow", len(seconds), slowest, f"median {median:.2f} s, its timeout is {limit:g} s")
    elif median > SLOW_SYNC_S and not spec.is_async:
        yield Violation(
            "too slow", len(seconds), slowest, f"median {median:.2f} s: make it async, so that calls overlap"
        )


def _verdict(outcome: Outcome) -> tuple[Any, ...]:
    return outcome.cause, outcome.value if outcome.ok else None, dict(outcome.parts)


def _seconds(judged: Sequence[Judged]) -> np.ndarray:  # float64 [calls that gave a score]
    return np.array([outcome.seconds for j in judged for outcome in (j.first, j.second) if outcome.ok])


async def _judge(spec: RewardSpec, groups: Sequence[Sequence[Sample]]) -> list[Judged]:
    pool = RewardPool([RewardWorker([spec])])
    judged: list[Judged] = []
    try:
        await pool.start()
        for group in groups:
            answers = [sample.answer for sample in group]
            first = await pool.run_reward(spec, group[0].task, answers, check=True)
            second = await pool.run_reward(spec, group[0].task, answers, check=True)
            judged += [Judged(*row) for row in zip(group, first, second, strict=True)]
    finally:
        await pool.close()
    return judged


def _reward_config(fn: str, kwargs: Iterable[str], timeout_s: float) -> RewardConfig:
    try:
        return RewardConfig(fn=fn, timeout_s=timeout_s, kwargs=dict(_parse(pair) for pair in kwargs))
    except ValidationError as error:
        raise ConfigError(f"check-reward: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from None


def _parse(pair: str) -> tuple[str, Any]:
    key, separator, raw = pair.partition("=")
    if not separator:
        raise ConfigError(f"--kwargs {pair!r}: write it as key=value")
    try:
        return key.strip(), tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), raw


def _generated(tasks: Sequence[Task]) -> list[list[Sample]]:
    rng = random.Random(0)
    groups = []
    for task in tasks:
        noise = "".join(rng.choices(string.printable, k=RANDOM_CHARACTERS))
        texts = {"reference": task.answer, "empty": "", "random": noise}
        groups.append([_sample(task, kind, text) for kind, text in texts.items() if text is not None])
    return groups


def _given(path: Path, tasks: Sequence[Task]) -> list[list[Sample]]:
    """The completions of a file, those of one task together."""
    if not path.is_file():
        raise ConfigError(f"--completions: no file {path}")
    by_name = {task.prompt: task for task in tasks if isinstance(task.prompt, str)} | {task.id: task for task in tasks}
    groups: dict[str, list[Sample]] = {}
    for number, row in enumerate(read_rows(path), start=1):
        task = by_name.get(str(row.get("id", row.get("prompt"))))
        if task is None or not isinstance(row.get("completion"), str):
            raise ConfigError(
                f'{path}, row {number}: want {{"id": a task\'s id, or "prompt": its text, "completion": text}}'
            )
        groups.setdefault(task.id, []).append(_sample(task, "given", row["completion"]))
    if not groups:
        raise ConfigError(f"{path}: no completions in it")
    return list(groups.values())


def _sample(task: Task, kind: str, text: str) -> Sample:
    num_tokens = -(-len(text) // CHARACTERS_PER_TOKEN)
    return Sample(task, kind, make_answer(task, text, num_tokens, FinishReason.STOP))


def _print(spec: RewardSpec, judged: Sequence[Judged], violations: Sequence[Violation]) -> None:
    console = Console()
    how = f"{'async' if spec.is_async else 'sync'}, per {'group' if spec.per_group else 'sample'}"
    console.print(Text(f"{spec.config.fn} ({how}): {len(judged)} completions, each judged twice", style="bold"))
    console.print(_samples_table(judged))
    console.print(_kinds_table(judged))
    seconds = _seconds(judged) * 1e3
    if len(seconds):
        p50, p99 = np.percentile(seconds, (50, 99))
        console.print(f"time per call: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    if violations:
        console.print(_violations_table(violations))
    else:
        console.print("[green]keeps the contract[/green]")


def _samples_table(judged: Sequence[Judged]) -> Table:
    table = Table("task", "completion", "", "reward", "parts", title=f"the first {SHOWN_SAMPLES}", title_justify="left")
    for j in judged[:SHOWN_SAMPLES]:
        parts = "  ".join(f"{name} {value:.4g}" for name, value in j.first.parts.items())
        row = (j.sample.task.id, j.sample.kind, repr(j.sample.answer.text[:40]), _said(j.first), parts)
        table.add_row(*map(Text, row))  # plain text: a completion may hold what rich reads as markup
    return table


def _kinds_table(judged: Sequence[Judged]) -> Table:
    table = Table("completions", "judged", "mean", "lowest", "highest", "no score")
    for kind in dict.fromkeys(j.sample.kind for j in judged):
        outcomes = [j.first for j in judged if j.sample.kind == kind]
        values = [outcome.value for outcome in outcomes if outcome.ok]
        numbers = [f"{f(values):.4g}" for f in (np.mean, min, max)] if values else ["-"] * 3
        table.add_row(kind, str(len(outcomes)), *numbers, str(len(outcomes) - len(values)))
    return table


def _violations_table(violations: Sequence[Violation]) -> Table:
    table = Table("violation", "times", "first on task", "detail", title="breaks the contract", title_justify="left")
    for violation in violations:
        last_lines = "\n".join(violation.detail.splitlines()[-4:])
        rest = (str(violation.times), violation.example, last_lines)
        table.add_row(Text(violation.what, style="red"), *map(Text, rest))
    return table


def _said(outcome: Outcome) -> str:
    return f"{outcome.value:.6g}" if outcome.ok else outcome.cause
