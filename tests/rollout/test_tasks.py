"""Task files, and the order in which a run goes through them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rollout.config import TasksConfig
from rollout.tasks import MIX_BLOCK, TaskError, TaskStream, load_tasks, sample_seed
from rollout.types import Task

CONFIG = TasksConfig(train="tasks.jsonl")


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def make_tasks(**counts: int) -> tuple[Task, ...]:
    return tuple(Task(f"{domain}-{i}", domain, "?") for domain, count in counts.items() for i in range(count))


def test_columns_become_fields_of_the_task(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    write(tmp_path, {"prompt": "1+1=", "answer": 2, "level": 3}, "", {"prompt": chat, "domain": "talk", "id": 7})
    first, second = load_tasks("tasks.jsonl", CONFIG, base_dir=tmp_path)
    assert first == Task("tasks.jsonl:1", "default", "1+1=", "2", {"level": 3})
    assert second == Task("7", "talk", tuple(chat), None, {})


def test_other_columns_can_be_named(tmp_path: Path) -> None:
    write(tmp_path, {"question": "q", "solution": "s"})
    config = TasksConfig(train="tasks.jsonl", prompt_key="question", answer_key="solution")
    (task,) = load_tasks("tasks.jsonl", config, base_dir=tmp_path)
    assert (task.prompt, task.answer, dict(task.fields)) == ("q", "s", {})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, r"tasks\.jsonl:2: no column 'prompt' \(columns: question\): set tasks\.prompt_key"),
        ("{not json", r"tasks\.jsonl:2: not a JSON object"),
        ([1], r"tasks\.jsonl:2: found list"),
        ({"prompt": ""}, r"tasks\.jsonl:2: column 'prompt' is ''"),
        ({"prompt": [{"role": "user"}]}, r"wants the keys \"role\" and \"content\""),
        ({"prompt": "q", "answer": [1, 2]}, r"tasks\.jsonl:2: column 'answer' is \[1, 2\]"),
        ({"prompt": "q", "domain": 3}, r"column 'domain' is 3"),
    ],
)
def test_mistakes_name_line_column_and_remedy(tmp_path: Path, row: Any, message: str) -> None:
    write(tmp_path, {"prompt": "fine"}, row)
    with pytest.raises(TaskError, match=message):
        load_tasks("tasks.jsonl", CONFIG, base_dir=tmp_path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no file 'none\.jsonl'"):
        load_tasks("none.jsonl", CONFIG, base_dir=tmp_path)
    write(tmp_path)
    with pytest.raises(TaskError, match="no tasks in it"):
        load_tasks("tasks.jsonl", CONFIG, base_dir=tmp_path)


def test_every_epoch_has_every_task_once_in_a_new_order() -> None:
    tasks = make_tasks(a=50)
    stream = TaskStream(tasks, seed=3, shuffle=True)
    epochs = [[stream.task(epoch * 50 + i).id for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(task.id for task in tasks) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != [task.id for task in tasks]


def test_file_order_without_shuffle() -> None:
    tasks = make_tasks(a=3, b=2)
    stream = TaskStream(tasks, seed=3, shuffle=False)
    assert [stream.task(i) for i in range(7)] == [*tasks, *tasks[:2]]


@pytest.mark.parametrize("weights", [None, {"a": 3.0, "b": 1.0}])
def test_task_is_a_pure_function_of_the_index(weights: dict[str, float] | None) -> None:
    tasks = make_tasks(a=20, b=30)
    indices = range(3 * MIX_BLOCK)
    forward = TaskStream(tasks, seed=1, shuffle=True, domain_weights=weights)
    backward = TaskStream(tasks, seed=1, shuffle=True, domain_weights=weights)
    expected = [forward.task(i) for i in indices]
    assert [backward.task(i) for i in reversed(indices)] == expected[::-1]
    other = TaskStream(tasks, seed=2, shuffle=True, domain_weights=weights)
    assert [other.task(i) for i in indices] != expected


def test_mixture_has_the_shares_asked_for_in_every_stretch() -> None:
    tasks = make_tasks(a=5, b=500, c=100)
    stream = TaskStream(tasks, seed=0, shuffle=True, domain_weights={"a": 2, "b": 1, "c": 1})
    domains = [stream.task(i).domain for i in range(2 * MIX_BLOCK)]
    assert Counter(domains) == {"a": MIX_BLOCK, "b": MIX_BLOCK // 2, "c": MIX_BLOCK // 2}
    for start in range(0, len(domains), 64):
        assert abs(domains[start : start + 64].count("a") - 32) <= 3


def test_each_domain_of_a_mixture_goes_through_all_its_tasks() -> None:
    tasks = make_tasks(a=7, b=40)
    stream = TaskStream(tasks, seed=0, shuffle=True, domain_weights={"a": 1, "b": 1})
    drawn = [stream.task(i) for i in range(4 * MIX_BLOCK)]
    for domain, size in (("a", 7), ("b", 40)):
        ids = [task.id for task in drawn if task.domain == domain]
        for start in range(0, len(ids) - size + 1, size):
            assert len(set(ids[start : start + size])) == size


def test_domain_without_weight_keeps_its_share_by_size() -> None:
    tasks = make_tasks(a=100, b=100, c=200)
    stream = TaskStream(tasks, seed=0, shuffle=True, domain_weights={"a": 3, "b": 1})
    counts = Counter(stream.task(i).domain for i in range(MIX_BLOCK))
    assert counts == {"a": MIX_BLOCK * 3 // 8, "b": MIX_BLOCK // 8, "c": MIX_BLOCK // 2}


def test_a_rare_domain_still_occurs() -> None:
    stream = TaskStream(make_tasks(a=10, b=10), seed=0, shuffle=True, domain_weights={"a": 1e9, "b": 1})
    assert Counter(stream.task(i).domain for i in range(MIX_BLOCK)) == {"a": MIX_BLOCK - 1, "b": 1}


def test_weight_for_an_unknown_domain_is_refused() -> None:
    with pytest.raises(TaskError, match=r"domains\.x\.weight: no task has this domain"):
        TaskStream(make_tasks(a=2), seed=0, shuffle=True, domain_weights={"x": 1})


def test_sample_seeds_are_distinct_stable_and_fit_int64() -> None:
    seeds = {sample_seed(run, group, sample) for run in range(3) for group in range(200) for sample in range(16)}
    assert len(seeds) == 3 * 200 * 16
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62
    assert sample_seed(0, 1, 2) == sample_seed(0, 1, 2) != sample_seed(0, 12, 0)
    assert sample_seed(0, 0, 0) == 5842066033578894005
