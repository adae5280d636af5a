"""Runs as jobs of a real Ray cluster, through the command line: followed, stopped, continued; and what is refused."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
import requests
from ray.job_submission import JobStatus

from benchmarks.ray_head import ray_head
from grpo.checkpoint import list_checkpoints
from grpo.commands import submit
from grpo.commands.submit import SubmitError, follow_job, stop_job, submit_run
from grpo.config import ConfigError, load_config
from grpo.records.metrics import read_metrics
from tests.toy import write_run

T = TypeVar("T")
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def run_file(toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the current folder, with all that it names; what it leaves behind goes elsewhere."""
    folder = tmp_path / "project"
    shutil.copytree(toy_model, folder / "model")
    monkeypatch.chdir(folder)
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # what is asked for comes before these
        monkeypatch.setenv(variable, "http://somewhere.invalid:8265")
    return write_run(folder, Path("model"), run={"output_dir": str(tmp_path / "runs")})


def test_a_run_file_outside_of_the_folder_that_travels_is_refused(run_file, tmp_path):
    elsewhere = tmp_path / "train.toml"
    shutil.copy(run_file, elsewhere)
    with pytest.raises(ConfigError, match=r"train\.toml does not lie in .*project, the folder that travels"):
        submit_run(load_config(elsewhere), elsewhere, address=NOBODY)


def test_a_run_folder_that_would_go_with_the_job_is_refused(run_file):
    with pytest.raises(ConfigError, match=r"run\.output_dir = 'runs' is relative, .* every node sees"):
        submit_run(load_config(run_file, ("run.output_dir=runs",)), run_file, address=NOBODY)


def test_an_address_that_nobody_answers_at_is_named(run_file):
    with pytest.raises(SubmitError, match=rf"no Ray dashboard answers at --address {NOBODY} .*: .*{NOBODY}"):
        submit_run(load_config(run_file), run_file, address=NOBODY)
    with pytest.raises(
        SubmitError, match=r"127\.0\.0\.1:6379 is not that of a dashboard: write it as http://head:8265"
    ):
        submit_run(load_config(run_file), run_file, address="127.0.0.1:6379")


class FlakyJobs:
    """A cluster's answers about one job, in order; exceptions are raised."""

    def __init__(self, statuses: Sequence[JobStatus | Exception], logs: Sequence[Sequence[str | Exception]]) -> None:
        self._statuses, self._logs = iter(statuses), iter(logs)

    def get_job_status(self, _: str) -> JobStatus:
        return _raised(next(self._statuses))

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        for text in next(self._logs):
            yield _raised(text)


def _raised(answer: T | Exception) -> T:
    if isinstance(answer, Exception):
        raise answer
    return answer


def test_what_was_printed_before_a_connection_broke_is_not_printed_again(monkeypatch):
    monkeypatch.setattr(submit, "_POLL_S", 0.0)
    gone = requests.ConnectionError("gone")
    client: Any = FlakyJobs(
        [JobStatus.RUNNING, gone, JobStatus.RUNNING, JobStatus.RUNNING, JobStatus.STOPPED],
        [["one ", "two ", aiohttp.ClientError("gone")], ["one tw"], ["one two three "], ["one two three four"]],
    )
    printed: list[str] = []
    asyncio.run(submit._print_logs(client, "job", printed.append))
    assert "".join(printed) == "one two three four"


def test_a_cluster_that_stays_silent_ends_the_wait(monkeypatch):
    monkeypatch.setattr(submit, "_POLL_S", 0.01)
    monkeypatch.setattr(submit, "PATIENCE_S", 0.05)
    client: Any = FlakyJobs([JobStatus.RUNNING, *[requests.ConnectionError("gone")] * 1000], [["one"]])
    with pytest.raises(SubmitError, match=r"has not answered for 0\.05 s; the run may go on: gone"):
        asyncio.run(submit._print_logs(client, "job", print))


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """Address of the dashboard of a cluster that has `keel` on its path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
        with ray_head(num_cpus=8, dashboard=True) as head:
            yield head.dashboard


def keel(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`keel ARGUMENTS` in a process of its own, in the current folder."""
    command = [str(Path(sys.executable).with_name("keel")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.slow
def test_a_job_is_followed_stopped_and_continued(dashboard: str, run_file: Path) -> None:
    at = ("--address", dashboard)
    done = keel("submit", run_file, *at)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [int(n) for n in re.findall(r"step (\d)/3", done.stdout)] == [0, 1, 2, 3]
    run_dir = load_config(run_file).run_dir
    assert [row["step"] for row in read_metrics(run_dir)] == [0, 1, 2, 3]

    again = keel("submit", run_file, *at)
    assert again.returncode == 2 and again.stdout.count("already holds a run") == 1, again.stdout
    assert "failed: Job entrypoint command failed with exit code 2" in again.stdout

    longer = ("-o", "run.name=long", "-o", "run.steps=500")
    taken = keel("submit", run_file, *at, *longer, "--detach")
    assert taken.returncode == 0, taken.stderr
    job = taken.stdout.split()[1].rstrip(";")
    assert job.startswith("keel-long-") and job.endswith("-1")
    long_dir = run_dir.with_name("long")
    deadline = time.monotonic() + 120
    while not any(row["step"] for row in read_metrics(long_dir)):
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.1)
    second = keel("submit", run_file, *at, *longer)
    assert second.returncode == 1 and f"is being written by {job}" in second.stderr

    stopped = keel("stop", job, *at)
    assert stopped.returncode == 0 and f"{job} has ended; submit its run file again with --resume" in stopped.stdout
    assert f"{job} had ended before" in keel("stop", job, *at).stdout
    followed = keel("follow", job, *at)
    assert followed.returncode == 0 and "continue with --resume" in followed.stdout
    assert len(list_checkpoints(long_dir)) == 1
    stopped_at = read_metrics(long_dir)[-1]["step"]
    assert 1 <= stopped_at < 500
    more = keel("submit", run_file, *at, "-o", "run.name=long", "-o", f"run.steps={stopped_at + 2}", "--resume")
    assert more.returncode == 0, more.stdout + more.stderr
    assert [row["step"] for row in read_metrics(long_dir)] == list(range(stopped_at + 3))


@pytest.mark.slow
def test_a_job_that_the_cluster_does_not_know_is_named(dashboard: str) -> None:
    with pytest.raises(SubmitError, match="does not know keel-nothing"):
        stop_job("keel-nothing", address=dashboard, write=print)
    with pytest.raises(SubmitError, match="does not know keel-nothing"):
        follow_job("keel-nothing", address=dashboard, write=print)
