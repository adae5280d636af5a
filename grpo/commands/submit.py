"""Runs as jobs of a Ray cluster: sent from anywhere that reaches its dashboard, followed, stopped.

The folder that a run is submitted from travels along, so that reward functions and tasks, and Keel itself where it lies
there, are those of the submitter. What a run leaves behind must not lie in it: the job's copy goes with the job.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shlex
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from grpo.config import ConfigError, TrainConfig

EXCLUDES = (".git", ".venv", "__pycache__", "/runs")
"""What does not travel, beside all that the folder's .gitignore names; in its syntax."""

PATIENCE_S = 60.0
"""Longest time without an answer from a dashboard that has answered before."""

_RUN_DIR = "keel_run_dir"
_POLL_S = 1.0
_FAILURES = (OSError, aiohttp.ClientError, RayError, RuntimeError, ValueError)
"""All that Ray's client raises where it is not answered, or is refused."""

_T = TypeVar("_T")


class SubmitError(RuntimeError):
    """The cluster does not answer, cannot take the run, or does not know the job; the message says what to do."""


def submit_run(
    config: TrainConfig,
    run_file: Path,
    *,
    address: str,
    overrides: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
) -> str:
    """Starts `keel train` with these overrides and options (`--resume`, `--fresh`) as a job; returns the job's id.

    Raises:
        ConfigError: the run file does not lie in the current folder, or `run.output_dir` would be lost with the job.
        SubmitError: nothing answers at the address, the folder cannot be sent, or the same run is under way already.
    """
    folder = Path.cwd()
    try:
        travelling = run_file.resolve().relative_to(folder.resolve())
    except ValueError:
        raise ConfigError(
            f"{run_file} does not lie in {folder}, the folder that travels to the cluster: submit from a folder that "
            "holds the run file and all that it names"
        ) from None
    if not Path(config.run.output_dir).is_absolute():
        raise ConfigError(
            f"run.output_dir = {config.run.output_dir!r} is relative, and the job's folder on the cluster goes with "
            "the job: name one that every node sees, for example -o run.output_dir=/shared/runs"
        )
    client = _connect(address)
    arguments = [str(travelling), *(part for override in overrides for part in ("-o", override)), *options]
    travels = {"working_dir": str(folder), "excludes": _excludes(folder, config), "env_vars": _variables(config)}
    with _asking(f"{folder} was not taken (of large files that need not travel, .gitignore is to have the names)"):
        return client.submit_job(
            entrypoint=shlex.join(["keel", "train", *arguments]),
            submission_id=_next_id(client, config),
            runtime_env=travels,
            metadata={_RUN_DIR: str(config.run_dir)},
        )


def follow_job(job_id: str, *, address: str, write: Callable[[str], object]) -> int:
    """Hands all that a job prints to `write`, from its start to its end; returns its exit code.

    That of a job that was stopped is 0. Raises SubmitError if the cluster does not know the job, or has not answered
    for `PATIENCE_S`; the job may go on.
    """
    client = _connect(address)
    _status_of(client, job_id)
    asyncio.run(_print_logs(client, job_id, write))
    job = _patiently(lambda: client.get_job_info(job_id))
    if job.status != JobStatus.FAILED:
        return 0
    write(f"\n{job_id} failed: {(job.message or '').partition(', last available logs')[0]}\n")
    return job.driver_exit_code or 1


def stop_job(job_id: str, *, address: str, write: Callable[[str], object]) -> bool:
    """Ends a run as Ctrl-C would, which leaves a checkpoint of its last step, and returns when it has ended. False if
    there was nothing to stop: it had ended by itself. `write` is told what is waited for.

    A run that takes longer than its own limits allow is killed. Raises SubmitError if the cluster does not know the
    job, or has not answered for `PATIENCE_S`.
    """
    client = _connect(address)
    if _status_of(client, job_id).is_terminal():
        return False
    with _asking(f"{job_id} was not stopped"):
        client.stop_job(job_id)
    write(f"waiting for {job_id} to end its step")
    while not _patiently(lambda: client.get_job_status(job_id)).is_terminal():
        time.sleep(_POLL_S)
    return True


def _connect(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        raise SubmitError(f"--address {address} is not that of a dashboard: write it as http://head:8265")
    logging.getLogger("ray").setLevel(logging.ERROR)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray would take it from there, or from RAY_ADDRESS, before ours
    with _asking(
        f"no Ray dashboard answers at --address {address} (to be reached from elsewhere, the head needs ray[default] "
        "and --dashboard-host=0.0.0.0)"
    ):
        return JobSubmissionClient(address)


def _next_id(client: JobSubmissionClient, config: TrainConfig) -> str:
    """A number on for every job of this run folder. Of two that are sent at once, the cluster refuses one.

    Raises SubmitError if one of them is under way: two runs would write into one folder.
    """
    run_dir = str(config.run_dir)
    with _asking("the cluster does not say what runs on it"):
        earlier = [job for job in client.list_jobs() if (job.metadata or {}).get(_RUN_DIR) == run_dir]
    for job in earlier:
        if not job.status.is_terminal():
            raise SubmitError(
                f"{run_dir} is being written by {job.submission_id}: follow it with `keel follow {job.submission_id}`, "
                f"end it with `keel stop {job.submission_id}`, or choose another run.name"
            )
    number = 1 + max((int(str(job.submission_id).rpartition("-")[2]) for job in earlier), default=0)
    return f"keel-{config.run.name}-{zlib.crc32(run_dir.encode()):08x}-{number}"


def _excludes(folder: Path, config: TrainConfig) -> list[str]:
    """With what earlier runs left behind, where that lies in the folder."""
    output_dir = Path(config.run.output_dir)
    inside = [f"/{output_dir.relative_to(folder)}"] if output_dir.is_relative_to(folder) else []
    return [*EXCLUDES, *inside]


def _variables(config: TrainConfig) -> dict[str, str]:
    """Has Ray end a job as Ctrl-C would, and wait for what Keel then still does: the rest of a training step, a sync
    with its probe, a checkpoint."""
    limits = config.cluster
    wait_s = 2 * limits.train_timeout_s + limits.sync_timeout_s + limits.generate_timeout_s
    return {
        "PYTHONUNBUFFERED": "1",
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(wait_s)),
    }


async def _print_logs(client: JobSubmissionClient, job_id: str, write: Callable[[str], object]) -> None:
    """A connection that breaks is made anew, and what was printed before is not printed again."""
    printed, failing_since = 0, math.inf
    while True:
        seen = 0
        try:
            status = client.get_job_status(job_id)  # asked first: of a job that has ended, all is there to be read
            async for text in client.tail_job_logs(job_id):
                write(text[max(0, printed - seen) :])
                seen += len(text)
                printed, failing_since = max(printed, seen), math.inf
            if status.is_terminal():
                return
        except _FAILURES as error:
            failing_since = min(failing_since, time.monotonic())
            if time.monotonic() - failing_since > PATIENCE_S:
                raise _silent(error) from error
        await asyncio.sleep(_POLL_S)


def _patiently(ask: Callable[[], _T]) -> _T:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask()
        except _FAILURES as error:
            if time.monotonic() > deadline:
                raise _silent(error) from error
            time.sleep(_POLL_S)


def _silent(error: BaseException) -> SubmitError:
    return SubmitError(f"the cluster has not answered for {PATIENCE_S:g} s; the run may go on: {error}")


def _status_of(client: JobSubmissionClient, job_id: str) -> JobStatus:
    with _asking(f"the cluster does not know {job_id}"):
        return client.get_job_status(job_id)


@contextmanager
def _asking(trouble: str) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        lines = str(error).strip().splitlines()  # of a traceback on the other side, the last one says it
        raise SubmitError(f"{trouble}: {lines[-1] if 'Traceback' in str(error) else str(error)}") from error
