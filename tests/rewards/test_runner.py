"""Everything a reward function can do to its process, done by real functions in real processes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from rewards.child import MAX_ASYNC_CALLS
from rewards.config import RewardConfig
from rewards.load import RewardError, RewardSpec, load_reward
from rewards.outcome import Outcome
from rewards.pool import RewardPool
from rewards.runner import ASYNC_GRACE_S, Job, RewardWorker
from rewards.types import Answer
from rollout.types import FinishReason, Task
from tests.rewards.hostile_rewards import BUSY_S

T = TypeVar("T")
TASK = Task("t", "math", "?", "7", {})


def spec_of(name: str, **settings: Any) -> RewardSpec:
    config = RewardConfig(fn=f"tests.rewards.hostile_rewards:{name}", **{"timeout_s": 20, "memory_gib": 0.5} | settings)
    return load_reward(config, base_dir=Path.cwd()).spec


def answers_of(*texts: str) -> list[Answer]:
    return [Answer(text, len(text), FinishReason.STOP) for text in texts]


def with_pool(work: Callable[[RewardPool], Coroutine[Any, Any, T]], *specs: RewardSpec, num_workers: int = 1) -> T:
    async def run() -> T:
        pool = RewardPool([RewardWorker(specs) for _ in range(num_workers)])
        try:
            await pool.start()
            return await work(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def judge(spec: RewardSpec, *texts: str, check: bool = False) -> list[Outcome]:
    return with_pool(lambda pool: pool.run_reward(spec, TASK, answers_of(*texts), check=check), spec)


def said(outcomes: Sequence[Outcome]) -> list[float | str]:
    return [outcome.cause or outcome.value for outcome in outcomes]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("raise", "KeyError"),
        ("sys-exit", "SystemExit"),
        ("exit", "exited with status 3"),
        ("crash", "signal SIGSEGV"),
        ("hoard", "memory"),
        ("flood", "flooded its output"),
        ("none", "returned NoneType, not a number"),
        ("text", "returned str, not a number"),
        ("nan", "returned a number that is not finite"),
        ("abstain", "abstained"),
    ],
)
@pytest.mark.parametrize("name", ["misbehave", "misbehave_later"])
def test_a_failure_costs_its_own_sample_only(name: str, text: str, cause: str) -> None:
    assert said(judge(spec_of(name), "ok", text, "fine", "good")) == [1.0, cause, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "text"), [("misbehave", "hang"), ("misbehave_later", "hang"), ("misbehave_later", "block")]
)
def test_a_call_that_takes_too_long_costs_its_own_sample_only(name: str, text: str) -> None:
    assert said(judge(spec_of(name, timeout_s=1), "ok", text, "fine")) == [1.0, "timeout", 1.0]


def test_every_failure_in_one_group() -> None:
    texts = ("exit", "ok", "crash", "hang", "hoard", "raise", "flood", "ok")
    wanted = ["exited with status 3", 1.0, "signal SIGSEGV", "timeout", "memory", "KeyError", "flooded its output", 1.0]
    assert said(judge(spec_of("misbehave", timeout_s=4), *texts)) == wanted


def test_calls_under_way_beside_a_crash_are_made_again() -> None:
    assert said(judge(spec_of("misbehave_later"), "patient", "crash", "patient")) == [1.0, "signal SIGSEGV", 1.0]


def test_closing_the_connection_is_no_way_out() -> None:
    first, second = judge(spec_of("misbehave"), "close-everything", "ok")
    assert first.cause == "exited with status 1" or first.cause.startswith("signal ")
    assert second.value == 1.0


def test_the_last_words_and_the_traceback_are_kept_for_the_log() -> None:
    spoke, crashed, raised = judge(spec_of("misbehave"), "chatter", "crash", "raise")
    assert spoke.ok and "a few words" in crashed.detail and "KeyError: 'x'" in raised.detail


def test_what_a_killed_call_started_is_killed_too(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    assert said(judge(spec_of("misbehave", timeout_s=1), f"hang-with-child {file}")) == ["timeout"]
    pid = int(file.read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)


def test_functions_run_in_a_session_of_their_own() -> None:
    (outcome,) = judge(spec_of("where"), "x")
    assert outcome.parts["pid"] == outcome.parts["session"] != os.getpid()


def test_a_killed_process_is_replaced_and_its_sample_is_the_one_it_was_on() -> None:
    spec = spec_of("misbehave_later")

    async def work(pool: RewardPool) -> list[Outcome]:
        running = asyncio.create_task(pool.run_reward(spec, TASK, answers_of("patient")))
        await asyncio.sleep(0.15)
        for child in psutil.Process().children():
            if "rewards.child" in " ".join(child.cmdline()):
                child.kill()
        first = await running
        return [*first, *await pool.run_reward(spec, TASK, answers_of("ok"))]

    assert said(with_pool(work, spec)) == ["signal SIGKILL", 1.0]


def test_results_with_parts_and_arguments() -> None:
    (outcome,) = judge(spec_of("measured", kwargs={"scale": 2}), "four")
    assert (outcome.value, dict(outcome.parts)) == (8.0, {"tokens": 4.0})


def test_a_group_is_judged_by_one_call() -> None:
    outcomes = judge(spec_of("rank"), "ab", "abcd", "")
    assert said(outcomes) == [0.5, 1.0, "abstained"] and outcomes[0].parts == {"longest": 4.0}


def test_a_failed_group_call_costs_its_group() -> None:
    assert said(judge(spec_of("rank"), "ab", "exit")) == ["exited with status 3"] * 2
    assert said(judge(spec_of("rank"), "ab", "short")) == ["returned 1 results for 2 answers"] * 2


def test_mutation_is_seen_and_never_reaches_the_caller() -> None:
    outcomes = judge(spec_of("mutating"), "x", "y", check=True)
    assert all(outcome.ok and outcome.mutated for outcome in outcomes) and TASK.fields == {}
    assert not any(outcome.mutated for outcome in judge(spec_of("measured"), "x", check=True))


@pytest.mark.parametrize("name", ["poisoning", "poisoning_later"])
def test_where_mutation_is_looked_for_no_call_sees_another_ones(name: str) -> None:
    """What it puts in cannot even be pickled."""
    outcomes = judge(spec_of(name), "x", "y", check=True)
    assert said(outcomes) == [0.0, 0.0] and all(outcome.mutated for outcome in outcomes)


def test_a_traceback_begins_in_the_function() -> None:
    for name in ("misbehave", "misbehave_later"):
        (outcome,) = judge(spec_of(name), "raise")
        assert "in misbehave" in outcome.detail and "child.py" not in outcome.detail


def test_async_calls_of_one_worker_overlap() -> None:
    spec = spec_of("one_second")
    started = time.perf_counter()
    assert said(judge(spec, *"a" * 64)) == [1.0] * 64
    assert time.perf_counter() - started < 10, "one after the other they take 64 s"


def test_more_async_calls_than_may_run_at_a_time_wait_their_turn() -> None:
    spec = spec_of("one_second", timeout_s=2)
    started = time.perf_counter()
    assert said(judge(spec, *"a" * (2 * MAX_ASYNC_CALLS + 1))) == [1.0] * (2 * MAX_ASYNC_CALLS + 1)
    assert time.perf_counter() - started >= 3, "they ran all at once"


def test_calls_that_hold_the_event_loop_up_have_their_whole_timeout_each() -> None:
    timeout_s, num_calls = 0.5, 14
    assert num_calls * BUSY_S > timeout_s + ASYNC_GRACE_S
    assert said(judge(spec_of("busy_later", timeout_s=timeout_s), *"a" * num_calls)) == [1.0] * num_calls


def test_a_blocking_call_costs_no_other_call_its_sample_or_its_time() -> None:
    outcomes = judge(spec_of("busy_later", timeout_s=1), "a", "block", "b", "c")
    assert said(outcomes) == [1.0, "timeout", 1.0, 1.0]
    assert all(outcome.seconds < 1 for outcome in outcomes if outcome.ok)


def test_slow_sync_calls_are_spread_over_the_workers() -> None:
    spec = spec_of("slow")

    async def work(pool: RewardPool) -> float:
        await pool.run_reward(spec, TASK, answers_of("learn how slow it is"))
        started = time.perf_counter()
        await pool.run_reward(spec, TASK, answers_of(*"abcdef"))
        return time.perf_counter() - started

    assert with_pool(work, spec, num_workers=3) < 6 * 0.3, "the six calls ran one after the other"


def test_a_quick_reward_pays_little_per_sample() -> None:
    spec = spec_of("measured")

    async def work(pool: RewardPool) -> float:
        await pool.run_reward(spec, TASK, answers_of(*"abcdefgh"))
        started = time.perf_counter()
        for _ in range(25):
            await pool.run_reward(spec, TASK, answers_of(*"abcdefgh"))
        return (time.perf_counter() - started) / (25 * 8)

    assert with_pool(work, spec) < 2e-3


def test_a_function_that_cannot_be_loaded_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(task, answer):\n    return 1.0\n")
    spec = load_reward(RewardConfig(fn="./mine.py:f"), base_dir=tmp_path).spec
    (tmp_path / "mine.py").write_text("import os\nos._exit(5)\n")
    with pytest.raises(RewardError, match="exited with status 5"):
        with_pool(lambda pool: pool.run_reward(spec, TASK, answers_of("x")), spec)


def test_a_closed_worker_says_so() -> None:
    spec = spec_of("measured")

    async def run() -> None:
        worker = RewardWorker([spec])
        await worker.start()
        await worker.close()
        with pytest.raises(RewardError, match="was closed"):
            await worker.run(Job(spec.key, TASK, tuple(answers_of("x"))))

    asyncio.run(run())
