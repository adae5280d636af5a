"""Judge models that Keel starts itself: vLLM's OpenAI server as a child process, for `keel judge` and for runs.

A run file asks for one with `endpoint = "keel"` among a judge's kwargs; `owned_judges` starts it before the run and
stops it after. On a machine with GPUs write `endpoint = "keel:7"` to give it GPU 7 (`CUDA_VISIBLE_DEVICES`), and keep
that one from the run. The server listens on this machine only: on a cluster of several, start `keel judge` yourself
and give its URL.

vLLM is not imported here: the server is `python -m vllm.entrypoints.openai.api_server` with structured output on.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import httpx

from grpo.config import ConfigError, TrainConfig
from rewards.config import RewardConfig
from rewards.judge.client import OWNED, Judge, check_endpoint
from rewards.judge.report import judge_items, measure, read_items, render
from rewards.judge.settings import Access, Sampling
from rollout.config import TasksConfig
from rollout.tasks import load_tasks

DEFAULT_PORT = 8199
JUDGES = "rewards.rubric_judge"
"""The module of the shipped judges."""
STOP_S = 20.0
"""Longest wait for a server to stop; its guard kills it after half of that."""
_POLL_S = 0.2
_LOG_LINES = 25

# Guided replies without a bound on white space run until max_tokens; sampling defaults are Keel's, not the model's.
_SERVER_ARGS = (
    '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}',
    "--generation-config=vllm",
)
# A seeded request whose prompt is prefilled in chunks ends vLLM's CPU engine ("CPU Generator does not use offset").
_CPU_ARGS = ("--enforce-eager", "--no-enable-chunked-prefill")
_CPU_ENV = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # V2 wants Triton; a judge records nothing, so V1 serves it
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less, and up in half the time
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every server pins itself to the same cores
}


class JudgeServerError(RuntimeError):
    """A judge's server that did not come up or ended by itself; carries the end of its log."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a judge's server is started."""

    devices: str = ""
    """GPUs it may use, as in `CUDA_VISIBLE_DEVICES`; empty: what this process may use."""
    cpu_threads: int = 1
    """Compute threads on vLLM's CPU build."""
    kv_cache_gib: float = 2.0
    """KV cache on the CPU build; on GPUs vLLM's `--gpu-memory-utilization` decides (see `vllm_args`)."""
    start_timeout_s: float = 900.0
    """Longest wait until it answers: large weights take minutes to load."""
    vllm_args: tuple[str, ...] = ()
    """Further arguments of the server, for example `("--max-model-len", "8192", "--tensor-parallel-size", "2")`."""


DEFAULT_OPTIONS = ServerOptions()


def serve(
    model: str, *, port: int = DEFAULT_PORT, host: str = "127.0.0.1", options: ServerOptions = DEFAULT_OPTIONS
) -> None:
    """Runs a judge's server until Ctrl-C, or until this process is ended in any way; prints its endpoint once it is up.

    Args:
        model: a Hugging Face folder or id; requests name the model the same way.
        host: address to listen on. Anything but a loopback address is open to whoever can reach it, unless
            `--api-key` is among the arguments.

    Raises:
        JudgeServerError: it did not come up, or ended by itself.
    """
    try:
        with _running(model, port=port, host=host, options=options) as server:
            print(f"judge  {model}\nendpoint  {server.endpoint}\nlog  {server.log}\nCtrl-C stops it", flush=True)
            server.wait()
    except KeyboardInterrupt:
        print("stopped", flush=True)


@contextmanager
def judge_server(
    model: str, *, port: int = 0, host: str = "127.0.0.1", options: ServerOptions = DEFAULT_OPTIONS
) -> Iterator[str]:
    """A judge's server for the block; gives its endpoint.

    Args:
        port: 0 takes a free one.

    Raises:
        JudgeServerError: it did not come up.
    """
    with _running(model, port=port, host=host, options=options) as server:
        yield server.endpoint


@contextmanager
def owned_judges(config: TrainConfig, options: ServerOptions = DEFAULT_OPTIONS) -> Iterator[TrainConfig]:
    """Starts a server for every judge model that a run file leaves to Keel, for the block, after a look whether the
    others answer: from here, which on a cluster of several machines need not be where rewards run.

    Gives the same configuration with `endpoint = "keel"` replaced by the servers' endpoints, in `[[rewards]]` and in
    every domain's rewards; the configuration itself where there is none.

    Raises:
        ConfigError: such a reward does not name its model.
        JudgeError: nothing answers at the endpoint of another judge.
        JudgeServerError: a server did not come up.
    """
    for endpoint in sorted({given for reward in _all_rewards(config) if (given := _given_endpoint(reward))}):
        check_endpoint(endpoint)
    with ExitStack() as stack:
        endpoints: dict[tuple[str, str], str] = {}
        for model, devices in sorted({owned for reward in _all_rewards(config) if (owned := _owned(reward))}):
            server = judge_server(model, options=replace(options, devices=devices))
            endpoints[model, devices] = stack.enter_context(server)
        yield _with_endpoints(config, endpoints) if endpoints else config


def report(
    file: Path,
    *,
    endpoint: str,
    model: str,
    repeats: int = 3,
    sampling: Sampling | None = None,
    access: Access | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Measures how far a judge agrees with itself and with given labels; prints a table, then the same as JSON.

    Args:
        file: one JSON object per line: `prompt`, `rubric`, `completion`, and where there are labels `label` (the total
            in [0, 1]) or `labels` (scores by criterion id, each on its scale).
        repeats: judgements of every completion, each with its own seed and nonce, past the cache.
        output: where to write the JSON instead of printing it.

    Returns:
        What `rewards.judge.report.AgreementReport.to_json` gives.

    Raises:
        TaskError, RubricError: the file cannot be used; names the row.
        JudgeError: the endpoint is not there.
    """
    items = read_items(load_tasks(str(file), TasksConfig(train=str(file)), base_dir=Path.cwd()))
    judge = Judge(endpoint, model, sampling or Sampling(), access or Access())
    agreement = measure(items, asyncio.run(judge_items(items, judge, repeats=repeats)))
    print(render(agreement))
    values = agreement.to_json()
    if output is None:
        print(json.dumps(values))
    else:
        output.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return values


@dataclass(frozen=True, slots=True)
class _Server:
    """A server's guard process and where to reach what it guards."""

    guard: subprocess.Popen[bytes]
    address: str
    log: Path

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}/v1"

    def wait_until_up(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            if self.guard.poll() is not None:
                self.wait()
            if time.monotonic() > deadline:
                raise JudgeServerError(f"the judge's server was not up after {timeout_s:g} s:\n{self._log_end()}")
            time.sleep(_POLL_S)

    def wait(self) -> NoReturn:
        """Does not return: waits until the server ends by itself, which is an error."""
        code = self.guard.wait()
        raise JudgeServerError(f"the judge's server ended with code {code}:\n{self._log_end()}")

    def stop(self) -> None:
        assert self.guard.stdin is not None
        self.guard.stdin.close()
        try:
            self.guard.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.guard.terminate()
            self.guard.wait()

    def _answers(self) -> bool:
        try:
            with httpx.Client(trust_env=False, timeout=2.0) as client:
                return client.get(f"http://{self.address}/health").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _log_end(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([*lines[-_LOG_LINES:], f"(all of it: {self.log})"])


@contextmanager
def _running(model: str, *, port: int, host: str, options: ServerOptions) -> Iterator[_Server]:
    port = _check_port(host, port)
    log = Path(tempfile.mkdtemp(prefix="keel-judge-")) / "server.log"
    with log.open("wb") as output:
        guard = subprocess.Popen(
            [sys.executable, "-m", "grpo.judge_guard", *_command(model, host, port, options)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(options),
            start_new_session=True,  # Ctrl-C in a terminal is for us; we stop the server
        )
    server, keep_log = _Server(guard, f"{host}:{port}", log), False
    try:
        server.wait_until_up(options.start_timeout_s)
        yield server
    except JudgeServerError:
        keep_log = True
        raise
    finally:
        server.stop()
        if not keep_log:
            shutil.rmtree(log.parent)


def _check_port(host: str, port: int) -> int:
    """The port, a free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise JudgeServerError(f"{host}:{port}: {error.strerror}: choose another port") from None
        return probe.getsockname()[1]


def _command(model: str, host: str, port: int, options: ServerOptions) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--served-model-name", model, "--host", host, "--port", str(port), *_SERVER_ARGS]
    if _on_cpu():
        command += [*_CPU_ARGS, "--kv-cache-memory-bytes", str(int(options.kv_cache_gib * 2**30))]
    return [*command, *options.vllm_args]


def _environment(options: ServerOptions) -> dict[str, str]:
    environment = os.environ | {
        "VLLM_PLUGINS": "",  # Keel's plugin is for engines that train
        "VLLM_NO_USAGE_STATS": "1",
    }
    if options.devices:
        environment["CUDA_VISIBLE_DEVICES"] = options.devices
    if _on_cpu():
        environment |= _CPU_ENV | {"OMP_NUM_THREADS": str(options.cpu_threads)}
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would win over --kv-cache-memory-bytes
    return environment


def _on_cpu() -> bool:
    """Whether vLLM's CPU build is what is installed."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _all_rewards(config: TrainConfig) -> list[RewardConfig]:
    own: Sequence[RewardConfig] = [r for domain in config.domains.values() for r in domain.rewards or ()]
    return [*config.rewards, *own]


def _owned(reward: RewardConfig) -> tuple[str, str] | None:
    """Model and devices of a judge that the run has to start."""
    endpoint = reward.kwargs.get("endpoint")
    if not isinstance(endpoint, str) or endpoint.partition(":")[0] != OWNED:
        return None
    model = reward.kwargs.get("model")
    if not isinstance(model, str) or not model:
        raise ConfigError(f'rewards.kwargs: endpoint = "{endpoint}" starts a server: set model to a folder or id')
    return model, endpoint.partition(":")[2]


def _given_endpoint(reward: RewardConfig) -> str | None:
    """Where a shipped judge is reached that the run does not start."""
    endpoint = reward.kwargs.get("endpoint")
    shipped = reward.fn.partition(":")[0] == JUDGES and isinstance(endpoint, str)
    return str(endpoint) if shipped and _owned(reward) is None else None


def _with_endpoints(config: TrainConfig, endpoints: dict[tuple[str, str], str]) -> TrainConfig:
    def replaced(rewards: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
        return tuple(
            reward.model_copy(update={"kwargs": {**reward.kwargs, "endpoint": endpoints[owned]}})
            if (owned := _owned(reward))
            else reward
            for reward in rewards
        )

    domains = {
        name: domain if domain.rewards is None else domain.model_copy(update={"rewards": replaced(domain.rewards)})
        for name, domain in config.domains.items()
    }
    return config.model_copy(update={"rewards": replaced(config.rewards), "domains": domains})
