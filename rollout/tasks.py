"""Task files in, `Task`s out, and the order in which a run goes through them.

Reads a `.jsonl` file or a Hugging Face data set. Knows nothing of tokens: prompt lengths are checked where a tokenizer
is. The order is a pure function of a group's index, so a resumed run needs that number and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rollout.config import TasksConfig
from rollout.types import Task

DEFAULT_DOMAIN = "default"
"""The domain of a task whose row has no `domain` column."""

MIX_BLOCK = 1024
"""Groups in one block of a domain mixture: shares are exact to 1/1024, and every domain occurs in every block."""


class TaskError(ValueError):
    """A task file that cannot be used: the message names file, line and column, and the remedy."""


def load_tasks(source: str, config: TasksConfig, *, base_dir: Path) -> tuple[Task, ...]:
    """Reads all tasks of `tasks.train` or `tasks.eval`.

    Args:
        source: a `.jsonl` file (looked up beside the run file, then in the working directory), or a Hugging Face data
            set as `name`, `name:split` or `name:config:split`; the split is `train` unless given.
        base_dir: the run file's folder.

    Columns: `config.prompt_key` (text or chat messages) is needed; `config.answer_key`, `domain` and `id` are optional;
    everything else is kept in `Task.fields`.

    Raises:
        TaskError: nothing there, not JSON, a missing or wrong column, or no tasks at all.
    """
    path = find_beside(source, base_dir)
    if path is not None:
        tasks = tuple(_to_task(row, where, config) for where, row in _read_jsonl(path))
    elif source.endswith((".jsonl", ".json")) or source.startswith((".", "/")):
        raise TaskError(
            f"tasks: no file {source!r} in {base_dir.resolve()} or {Path.cwd()}: correct the path in [tasks]"
        )
    else:
        tasks = tuple(_to_task(row, where, config) for where, row in _read_dataset(source))
    if not tasks:
        raise TaskError(f"{path or source}: no tasks in it; a task is one JSON object per line")
    return tasks


def find_beside(name: str, base_dir: Path) -> Path | None:
    """The file or folder `name` beside the run file, else in the working directory, else None."""
    for folder in (base_dir, Path.cwd()):
        if (folder / name).exists():
            return (folder / name).resolve()
    return None


def _read_jsonl(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Each row with `file:line` for messages and default ids; blank lines are skipped."""
    if path.is_dir():
        raise TaskError(f"{path}: is a folder; name the .jsonl file in it")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path.name}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TaskError(f"{where}: not a JSON object ({error}): write one object per line, in UTF-8") from None
            if not isinstance(row, dict):
                raise TaskError(
                    f'{where}: found {type(row).__name__}, want an object like {{"prompt": ..., "answer": ...}}'
                )
            yield where, row


def _read_dataset(source: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    from datasets import load_dataset

    parts = source.split(":")
    if len(parts) > 3:
        raise TaskError(f"tasks: {source!r}: write a data set as name, name:split or name:config:split")
    name, config_name, split = parts[0], parts[1] if len(parts) == 3 else None, parts[-1] if len(parts) > 1 else "train"
    try:
        rows = load_dataset(name, config_name, split=split)
    except (OSError, ValueError) as error:
        raise TaskError(
            f"tasks: {source!r} is neither a file nor a data set that could be loaded: {error}. Correct the name, or "
            f"give a .jsonl file"
        ) from error
    for number, row in enumerate(rows):
        yield f"{source}:{number}", dict(row)


def _to_task(row: Mapping[str, Any], where: str, config: TasksConfig) -> Task:
    prompt_key, answer_key = config.prompt_key, config.answer_key
    if prompt_key not in row:
        raise TaskError(
            f"{where}: no column {prompt_key!r} (columns: {', '.join(row)}): set tasks.prompt_key to the prompt's "
            "column"
        )
    domain = row.get("domain", DEFAULT_DOMAIN)
    if not isinstance(domain, str) or not domain:
        raise TaskError(f"{where}: column 'domain' is {domain!r}: want a name like \"math\"")
    used = {prompt_key, answer_key, "domain", "id"}
    return Task(
        id=str(row.get("id", where)),
        domain=domain,
        prompt=_to_prompt(row[prompt_key], f"{where}: column {prompt_key!r}"),
        answer=_to_answer(row.get(answer_key), f"{where}: column {answer_key!r}"),
        fields={key: value for key, value in row.items() if key not in used},
    )


def _to_prompt(value: Any, where: str) -> str | tuple[Mapping[str, Any], ...]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        for message in value:
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                raise TaskError(f'{where}: message {message!r} wants the keys "role" and "content"')
        return tuple(value)
    raise TaskError(f"{where} is {value!r}: want text, or a list of chat messages")


def _to_answer(value: Any, where: str) -> str | None:
    """Numbers become text: rewards compare text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise TaskError(
        f"{where} is {value!r}: want text or a number; put anything else in a column of its own (task.fields)"
    )


class TaskStream:
    """The endless sequence of tasks that a run trains on.

    Without `domain_weights` every task comes once per epoch, in a new seeded order each time. With them each domain has
    its own such order, and the domains are mixed by share. `task(i)` depends on nothing but its arguments and `i`.
    """

    def __init__(
        self, tasks: Sequence[Task], *, seed: int, shuffle: bool, domain_weights: Mapping[str, float] | None = None
    ) -> None:
        """
        Args:
            domain_weights: relative shares of the domains named in it. A domain that is not named keeps the share it
                has by number of tasks; the named ones divide the rest in proportion to their weights.

        Raises:
            TaskError: no tasks, or a weight for a domain without tasks.
        """
        if not tasks:
            raise TaskError("a task stream needs at least one task")
        by_domain: dict[str, list[Task]] = {}
        for task in tasks:
            by_domain.setdefault(task.domain if domain_weights else "", []).append(task)
        shares = _shares({domain: len(members) for domain, members in by_domain.items()}, domain_weights or {})
        self._orders = [_Order(members, _seed_words(seed, domain), shuffle) for domain, members in by_domain.items()]
        self._quotas = _quotas([shares[domain] for domain in by_domain])
        self._seed = seed
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def task(self, group_index: int) -> Task:
        """The task of group `group_index` (0, 1, 2, ...)."""
        if len(self._orders) == 1:
            return self._orders[0][group_index]
        number, place = divmod(group_index, MIX_BLOCK)
        if self._block is None or self._block[0] != number:
            self._block = (number, *_mix_block(self._quotas, _seed_words(self._seed, f"mix {number}")))
        domain, rank = self._block[1][place], self._block[2][place]
        return self._orders[domain][number * int(self._quotas[domain]) + int(rank)]


class _Order:
    """Endless epochs over one list of tasks, indexed from 0; keeps the permutations of the last two epochs asked
    for."""

    def __init__(self, tasks: Sequence[Task], seed_words: list[int], shuffle: bool) -> None:
        self._tasks = tasks
        self._seed_words = seed_words
        self._shuffle = shuffle
        self._permutations: dict[int, np.ndarray] = {}

    def __getitem__(self, index: int) -> Task:
        epoch, place = divmod(index, len(self._tasks))
        return self._tasks[self._permutation(epoch)[place] if self._shuffle else place]

    def _permutation(self, epoch: int) -> np.ndarray:  # int64 [tasks]
        if epoch not in self._permutations:
            if len(self._permutations) == 2:
                self._permutations.pop(next(iter(self._permutations)))
            self._permutations[epoch] = np.random.default_rng([*self._seed_words, epoch]).permutation(len(self._tasks))
        return self._permutations[epoch]


def _shares(counts: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, float]:
    """Each domain's share of the mixture; the shares add up to 1."""
    unknown = sorted(set(weights) - set(counts))
    if unknown:
        raise TaskError(f"domains.{unknown[0]}.weight: no task has this domain (domains: {', '.join(sorted(counts))})")
    total = sum(counts.values())
    shares = {domain: count / total for domain, count in counts.items()}
    left = sum(shares[domain] for domain in weights)
    scale = left / sum(weights.values()) if weights else 0.0
    return shares | {domain: weight * scale for domain, weight in weights.items()}


def _quotas(shares: Sequence[float]) -> np.ndarray:  # int64 [domains]
    """Groups of each domain in one block, by largest remainder, at least one each; they add up to `MIX_BLOCK`."""
    if len(shares) > MIX_BLOCK:
        raise TaskError(f"{len(shares)} domains are more than the {MIX_BLOCK} that can be mixed")
    exact = np.asarray(shares) * MIX_BLOCK
    quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
    while (missing := MIX_BLOCK - int(quotas.sum())) != 0:
        if missing > 0:
            quotas[np.argmax(exact - quotas)] += 1
        else:
            quotas[np.argmax(np.where(quotas > 1, quotas - exact, -np.inf))] -= 1
    return quotas


def _mix_block(quotas: np.ndarray, seed_words: list[int]) -> tuple[np.ndarray, np.ndarray]:  # each int64 [MIX_BLOCK]
    """Which domain stands at each place of a block, and its how-manieth there.

    Each domain's entries are spread evenly with a seeded jitter, so that every training step sees nearly the same
    mixture.
    """
    rng = np.random.default_rng(seed_words)
    domains = np.repeat(np.arange(len(quotas)), quotas)
    ranks = np.concatenate([np.arange(quota) for quota in quotas])
    order = np.argsort((ranks + rng.random(MIX_BLOCK)) / quotas[domains], kind="stable")
    return domains[order], ranks[order]


def _seed_words(seed: int, name: str) -> list[int]:
    """Seed material for numpy, stable across processes (`hash` is not)."""
    return [seed, int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")]


def sample_seed(run_seed: int, group_index: int, sample_index: int) -> int:
    """The seed of one completion: 63 bits, never negative (vLLM holds seeds as int64 and reads -1 as "none")."""
    text = f"{run_seed} {group_index} {sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
