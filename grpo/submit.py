"""Runs as jobs of a Ray cluster: sent from anywhere that reaches its dashboard, followed, stopped.

The folder that a run is submitted from travels along, so that reward functions and tasks, and Keel itself where it lies
there, are those of the submitter. What a run leaves behind must not lie in it: the job's copy goes with the job.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
from ray.job_submission import JobStatus, JobSubmissionClient

from grpo.config import ConfigError, TrainConfig

EXCLUDES = (".git", ".venv", "__pycache__", "/runs")
"""What does not travel, beside all that the folder's .gitignore names; in its syntax."""

_RUN_DIR = "keel_run_dir"
_POLL_S = 1.0


class SubmitError(RuntimeError):
    """The cluster cannot take the run, or does not know the job; the message says what to do."""


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
    _refuse_a_second(client, config.run_dir)
    if config.cluster.address is None:
        overrides += ("cluster.address=auto",)
    arguments = [str(travelling), *(part for override in overrides for part in ("-o", override)), *options]
    # Keel takes SIGINT for Ctrl-C: the step's training ends, a checkpoint is written.
    variables = {
        "PYTHONUNBUFFERED": "1",
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": str(int(config.cluster.train_timeout_s)),
    }
    try:
        return client.submit_job(
            entrypoint=shlex.join(["keel", "train", *arguments]),
            submission_id=f"keel-{config.run.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}",
            runtime_env={"working_dir": str(folder), "excludes": list(EXCLUDES), "env_vars": variables},
            metadata={_RUN_DIR: str(config.run_dir)},
        )
    except (ValueError, RuntimeError) as error:
        raise SubmitError(f"{folder} was not taken by {address}: {error}") from error


def follow_job(job_id: str, *, address: str, write: Callable[[str], object]) -> bool:
    """Hands all that a job prints to `write`, from its start to its end; returns whether it ended well.

    A job that was stopped has ended well. Raises SubmitError if the cluster does not know the job.
    """
    client = _connect(address)
    status = asyncio.run(_follow(client, job_id, write))
    if status == JobStatus.FAILED:
        write(f"\n{job_id} failed: {client.get_job_info(job_id).message}\n")
    return status != JobStatus.FAILED


def stop_job(job_id: str, *, address: str) -> None:
    """Ends a run as Ctrl-C would, and returns when it has ended: its last step is whole and in a checkpoint.

    Raises SubmitError if the cluster does not know the job.
    """
    client = _connect(address)
    _status_of(client, job_id)
    client.stop_job(job_id)
    while not _status_of(client, job_id).is_terminal():
        time.sleep(_POLL_S)


def _connect(address: str) -> JobSubmissionClient:
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SubmitError(
            f"no Ray dashboard answers at --address {address}: give that of the head's, as in http://head:8265 (the "
            f"head needs ray[default] and --dashboard-host=0.0.0.0 to be reached from elsewhere): {error}"
        ) from error


def _refuse_a_second(client: JobSubmissionClient, run_dir: Path) -> None:
    """Two runs would write into one folder."""
    for job in client.list_jobs():
        if not job.status.is_terminal() and (job.metadata or {}).get(_RUN_DIR) == str(run_dir):
            raise SubmitError(
                f"{run_dir} is being written by {job.submission_id}: follow it with `keel follow`, end it with "
                "`keel stop`, or choose another run.name"
            )


async def _follow(client: JobSubmissionClient, job_id: str, write: Callable[[str], object]) -> JobStatus:
    """A connection that breaks is made anew, and what was printed before is not printed again."""
    printed = 0
    while True:
        status = _status_of(client, job_id)  # asked first: of a job that has ended, all is there to be read
        seen = 0
        try:
            async for text in client.tail_job_logs(job_id):
                write(text[max(0, printed - seen) :])
                seen += len(text)
                printed = max(printed, seen)
        except (aiohttp.ClientError, RuntimeError):
            await asyncio.sleep(_POLL_S)
        if status.is_terminal():
            return status


def _status_of(client: JobSubmissionClient, job_id: str) -> JobStatus:
    try:
        return client.get_job_status(job_id)
    except RuntimeError as error:
        raise SubmitError(f"the cluster does not know {job_id}, or does not answer: {error}") from error
