"""The reward pool on a real Ray: failures stay in their sample, lost workers are replaced, and a run stops in time."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import ray

from grpo.cluster.rewards import RemoteRewardWorker
from grpo.cluster.waits import ClusterError
from grpo.config import ClusterConfig, load_config
from grpo.drops import DropRateError
from grpo.records.metrics import read_metrics
from grpo.train import train
from rewards.config import RewardConfig
from rewards.load import RewardError, RewardSpec, load_reward
from rewards.pool import RewardPool
from tests.rewards.test_runner import TASK, answers_of, said, spec_of
from tests.toy import write_run

T = TypeVar("T")
Work = Callable[[RewardPool], Coroutine[Any, Any, T]]

WHERE = spec_of("where")

TWO_IN_THREE_FAIL = """
calls = 0

def digits(task, answer):
    global calls
    calls += 1
    if calls % 3:
        raise KeyError("no such thing")
    return 1.0
"""


def on_ray(address: str, work: Work[T], spec: RewardSpec, *, num_workers: int = 2, **limits: Any) -> T:
    async def run() -> T:
        config = ClusterConfig(**limits)
        pool = RewardPool([RemoteRewardWorker(number, [spec, WHERE], config) for number in range(num_workers)])
        try:
            await pool.start()
            return await work(pool)
        finally:
            await pool.close()

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        return asyncio.run(run())
    finally:
        ray.shutdown()


async def process_of(pool: RewardPool) -> psutil.Process:
    """The process in which the pool's one worker runs functions, as a function in it says; its parent is the actor."""
    (outcome,) = await pool.run_reward(WHERE, TASK, answers_of("x"))
    return psutil.Process(int(outcome.parts["pid"]))


def test_failures_cost_their_own_sample_across_ray(ray_address: str) -> None:
    spec = spec_of("misbehave", timeout_s=4)
    texts = ("ok", "exit", "crash", "hang", "hoard", "flood", "raise", "abstain")
    wanted = [1.0, "exited with status 3", "signal SIGSEGV", "timeout", "memory", "flooded its output"]
    wanted += ["KeyError", "abstained"]
    assert said(on_ray(ray_address, lambda pool: pool.run_reward(spec, TASK, answers_of(*texts)), spec)) == wanted


def test_a_lost_worker_is_replaced_and_its_job_run_again(ray_address: str) -> None:
    spec = spec_of("misbehave_later")

    async def work(pool: RewardPool) -> list[float | str]:
        process = await process_of(pool)
        running = asyncio.create_task(pool.run_reward(spec, TASK, answers_of("patient", "patient")))
        await asyncio.sleep(0.15)
        os.kill(process.ppid(), signal.SIGKILL)
        outcomes = said(await running)
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "it outlives its worker"
        return outcomes

    assert on_ray(ray_address, work, spec, num_workers=1) == [1.0, 1.0]


def test_a_worker_that_is_lost_too_often_stops_the_run(ray_address: str) -> None:
    spec = spec_of("misbehave_later")

    async def work(pool: RewardPool) -> None:
        process = await process_of(pool)
        running = asyncio.create_task(pool.run_reward(spec, TASK, answers_of("patient")))
        await asyncio.sleep(0.15)
        os.kill(process.ppid(), signal.SIGKILL)
        with pytest.raises(ClusterError, match=r"reward worker 0 was lost and cluster\.max_worker_restarts = 0"):
            await running

    on_ray(ray_address, work, spec, num_workers=1, max_worker_restarts=0)


def test_a_function_that_cannot_be_loaded_there_is_the_same_error(ray_address: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(task, answer):\n    return 1.0\n")
    spec = load_reward(RewardConfig(fn="./mine.py:f"), base_dir=tmp_path).spec
    (tmp_path / "mine.py").write_text("1 / 0\n")
    with pytest.raises(RewardError, match=r"mine\.py failed: ZeroDivisionError"):
        on_ray(ray_address, lambda pool: pool.run_reward(spec, TASK, answers_of("x")), spec)


@pytest.mark.slow
def test_a_run_stops_past_its_drop_rate(ray_address: str, toy_model: Path, tmp_path: Path) -> None:
    run_file = write_run(tmp_path, toy_model, cluster={"address": ray_address, "reward_workers": 1})
    (tmp_path / "reward.py").write_text(TWO_IN_THREE_FAIL)
    config = load_config(run_file)
    with pytest.raises(DropRateError, match=r"16 of the step's 24 samples") as error:
        train(config, run_file=run_file)
    assert "digits: KeyError: 16 times, for example task tasks.jsonl:" in str(error.value)
    assert [row["step"] for row in read_metrics(config.run_dir)] == [0], "nothing may be trained on what is left"
