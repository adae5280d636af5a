"""The cache of verdicts, and the limit on requests that holds over processes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rewards.rubric_judge
from rewards.judge.cache import VerdictCache, cache_key
from rewards.judge.client import JudgeError
from rewards.judge.settings import Access, Sampling
from rewards.rubric_judge import rubric_compare, rubric_judge
from rewards.types import Abstain
from tests.rewards.judge_cases import CRITERIA, FAST, RUBRIC, TASK, answer, judge
from tests.rewards.scripted_endpoint import Step, completion, preference, scripted, verdict

GOOD = verdict({"accuracy": 4, "clarity": 5})


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return FAST.model_copy(update={"cache": str(tmp_path / "deep" / "judge.sqlite")})


def test_second_call_is_answered_from_disk(access: Access) -> None:
    with scripted(GOOD) as endpoint:
        first = judge(endpoint.url, access=access)
        assert judge(endpoint.url, access=access) == first
        assert len(endpoint.bodies) == 1
    assert judge(endpoint.url, access=access) == first, "nor is the endpoint needed"


def test_what_changes_no_verdict_is_not_in_the_key(access: Access) -> None:
    with scripted(GOOD) as one, scripted(GOOD) as other:
        judge(one.url, access=access)
        judge(other.url, access=access.model_copy(update={"concurrency": 3, "attempts": 9}))
        judge(one.url, access=access, task=replace(TASK, id="other", domain="other"))
        judge(one.url, replace(answer(), num_tokens=99), access=access)
        assert (len(one.bodies), len(other.bodies)) == (1, 0)


def with_criterion(**changes: Any) -> dict[str, Any]:
    """The task with its first criterion changed."""
    return {"task": replace(TASK, fields={"rubric": {**RUBRIC, "criteria": [{**CRITERIA[0], **changes}, CRITERIA[1]]}})}


CHANGES: dict[str, dict[str, Any]] = {
    "model": {"model": "n"},
    "prompt": {"task": replace(TASK, prompt="Explain tides!")},
    "reference": {"task": replace(TASK, fields={"rubric": {**RUBRIC, "reference": "Other."}})},
    "the task's answer": {"task": replace(TASK, answer="x", fields={"rubric": CRITERIA})},
    "weight": with_criterion(weight=2),
    "text": with_criterion(text="?"),
    "scale": with_criterion(scale=[0, 9]),
    "completion": {"given": answer("The moon does it!")},
    "tool calls": {"given": answer(tool_calls=({"name": "f"},))},
    "temperature": {"sampling": Sampling(temperature=0.1)},
    "seed": {"sampling": Sampling(seed=1)},
    "max_tokens": {"sampling": Sampling(max_tokens=99)},
    "extra": {"sampling": Sampling(extra={"min_p": 0.1})},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_verdict_depends_on_is_in_the_key(change: str, access: Access) -> None:
    with scripted(GOOD) as endpoint:
        judge(endpoint.url, access=access)
        judge(endpoint.url, access=access, **CHANGES[change])
        assert len(endpoint.bodies) == 2


def test_new_prompt_template_forgets_old_verdicts(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(GOOD) as endpoint:
        judge(endpoint.url, access=access)
        monkeypatch.setattr(rewards.rubric_judge, "PROMPT_VERSION", "next")
        judge(endpoint.url, access=access)
        assert len(endpoint.bodies) == 2


@pytest.mark.parametrize("bad", [completion("no"), completion(None, refusal="no"), Step(500)])
def test_failures_are_not_kept(bad: Step, access: Access) -> None:
    once = access.model_copy(update={"attempts": 1})
    with scripted([bad, GOOD]) as endpoint:
        with pytest.raises((Abstain, JudgeError)):
            judge(endpoint.url, access=once)
        assert judge(endpoint.url, access=once).parts["clarity"] == 1.0


def test_comparisons_are_kept_per_order(access: Access) -> None:
    with scripted(preference({"accuracy": "first", "clarity": "tie"})) as endpoint:
        for _ in range(2):
            call = rubric_compare(TASK, [answer("a"), answer("b")], endpoint=endpoint.url, model="m", access=access)
            asyncio.run(call)
        assert len(endpoint.bodies) == 2


def test_default_file_is_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with scripted(GOOD) as endpoint:
        judge(endpoint.url, access=Access(backoff_s=0.0))
    assert (tmp_path / "keel" / "judge.sqlite").is_file()


WRITER = """
import sys
from pathlib import Path
from rewards.judge.cache import VerdictCache
who, path = sys.argv[1], Path(sys.argv[2])
for i in range(100):
    VerdictCache(path).put(f"{who}-{i}", who * 1000)
    VerdictCache(path).put(f"shared-{i}", who)
    assert VerdictCache(path).get(f"shared-{i}") in ("a", "b", "c")
"""


def test_processes_write_to_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "judge.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, who, str(path)]) for who in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    cache = VerdictCache(path)
    assert all(cache.get(f"{who}-{i}") == who * 1000 for who in "abc" for i in range(100))
    assert cache.get("a-100") is None


def test_key_ignores_the_order_of_names_and_nothing_else() -> None:
    assert cache_key({"a": 1, "b": ["x"]}) == cache_key({"b": ["x"], "a": 1})
    keys = [{"a": 1, "b": ["x"]}, {"a": 1, "b": ["x", ""]}, {"a": "1", "b": ["x"]}, {"a": 1, "b": "x"}, {"a": 1}]
    assert len({cache_key(key) for key in keys}) == len(keys)


CALLER = """
import asyncio, sys
from rewards.judge.settings import Access
from rewards.rubric_judge import rubric_judge
from tests.rewards.judge_cases import TASK, answer

async def main():
    access = Access(concurrency=3, cache="")
    calls = [rubric_judge(TASK, answer(str(i)), endpoint=sys.argv[1], model="m", access=access) for i in range(12)]
    await asyncio.gather(*calls)

asyncio.run(main())
"""


@pytest.mark.parametrize("run", ["one loop", "two processes"])
def test_no_more_requests_at_once_than_allowed(run: str) -> None:
    def in_one_loop(url: str) -> None:
        async def main() -> None:
            access = FAST.model_copy(update={"concurrency": 3})
            calls = [rubric_judge(TASK, answer(str(i)), endpoint=url, model="m", access=access) for i in range(24)]
            await asyncio.gather(*calls)

        asyncio.run(main())

    def in_two_processes(url: str) -> None:
        callers = [subprocess.Popen([sys.executable, "-c", CALLER, url]) for _ in range(2)]
        assert [caller.wait(60) for caller in callers] == [0, 0]

    runs: dict[str, Callable[[str], None]] = {"one loop": in_one_loop, "two processes": in_two_processes}
    with scripted(replace(GOOD, delay_s=0.1)) as endpoint:
        runs[run](endpoint.url)
    assert len(endpoint.bodies) == 24
    assert endpoint.most_at_once == 3
