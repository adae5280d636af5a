"""Judges that Keel starts: nothing outlives its owner, and a real vLLM server gives well-formed verdicts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from grpo.config import ConfigError, TrainConfig, load_config
from grpo.judge import JudgeServerError, ServerOptions, judge_server, owned_judges, report
from rewards.judge.client import JudgeError
from rewards.judge.settings import Access, Sampling
from rewards.rubric_judge import rubric_compare, rubric_judge
from rewards.types import RewardResult
from tests.rewards.judge_cases import CRITERIA, TASK, answer
from tests.rewards.scripted_endpoint import Step, scripted
from tests.tiny_models import make_qwen3
from tests.toy import write_run, write_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}[assistant]\n"
TINY = ServerOptions(
    kv_cache_gib=0.0625,
    start_timeout_s=240.0,
    vllm_args=("--dtype", "float32", "--max-model-len", "6144", "--max-num-seqs", "8"),
)
SAMPLING = Sampling(temperature=1.0, max_tokens=400, rationale_chars=20)

# Starts a grandchild, as vLLM does, writes both process ids and waits.
STAND_IN = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
open(sys.argv[1] + ".tmp", "w").write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(300)
"""
OWNER = """
import subprocess, sys, time
command = [sys.executable, "-m", "grpo.judge_guard", sys.executable, "-c", sys.argv[1], sys.argv[2]]
guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
time.sleep(300)
"""


def until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def is_running(pid: int) -> bool:
    """False for one that is gone, or dead and not yet collected."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def answers(endpoint: str) -> bool:
    try:
        with httpx.Client(trust_env=False, timeout=2.0) as client:
            return client.get(f"{endpoint}/models").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_guarded_command_ends_with_its_owner(tmp_path: Path, number: signal.Signals) -> None:
    file = tmp_path / "pids"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, STAND_IN, str(file)])
    assert until(file.exists, 20)
    pids = [int(pid) for pid in file.read_text().split()]
    assert all(is_running(pid) for pid in pids)
    owner.send_signal(number)
    owner.wait()
    assert until(lambda: not any(is_running(pid) for pid in pids), 15)


def test_guard_ends_what_a_finished_command_left_behind_and_passes_its_code_on(tmp_path: Path) -> None:
    leaves = STAND_IN.replace("time.sleep(300)\n", "sys.exit(7)\n")
    command = [sys.executable, "-m", "grpo.judge_guard", sys.executable, "-c", leaves, str(tmp_path / "pids")]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as guard:
        assert guard.wait(30) == 7
    child = int((tmp_path / "pids").read_text().split()[1])
    assert until(lambda: not is_running(child), 5)


def test_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(JudgeServerError, match=f":{port}: .*choose another port"), judge_server("m", port=port):
            raise AssertionError("started")


def run_file(folder: Path, kwargs: dict[str, object]) -> TrainConfig:
    """Arithmetic by rule, letters by judge."""
    judged = {"fn": "rewards.rubric_judge:rubric_judge", "kwargs": kwargs}
    return load_config(write_run(folder, folder, domains={"letters": {"rewards": [judged]}}))


def test_run_without_own_judges_stays_as_it_is(tmp_path: Path) -> None:
    with scripted(Step()) as endpoint:
        config = run_file(tmp_path, {"endpoint": endpoint.url, "model": "m"})
        with owned_judges(config) as same:
            assert same is config
        assert endpoint.bodies == [], "it was asked for a verdict"


@pytest.mark.parametrize(
    ("url", "message"),
    [("http://127.0.0.1:1/v1", "nothing answers there .*start it"), ("127.0.0.1:1", "is not a URL")],
)
def test_a_judge_that_is_down_is_found_before_anything_starts(tmp_path: Path, url: str, message: str) -> None:
    config = run_file(tmp_path, {"endpoint": url, "model": "m"})
    with pytest.raises(JudgeError, match=message), owned_judges(config):
        raise AssertionError("started")


def test_own_judge_without_a_model_is_refused(tmp_path: Path) -> None:
    config = run_file(tmp_path, {"endpoint": "keel"})
    with pytest.raises(ConfigError, match='endpoint = "keel" starts a server: set model'), owned_judges(config):
        raise AssertionError("started")


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random tiny model with a character tokenizer, a chat template, and room for a judge's prompt."""
    folder = make_qwen3(tmp_path_factory.mktemp("judge") / "model")
    write_tokenizer(folder)
    for name, change in (
        ("config.json", {"max_position_embeddings": 8192}),
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return str(folder)


@pytest.mark.slow
def test_run_owns_a_vllm_server_with_guided_verdicts(
    judge_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    access = Access(cache=str(tmp_path / "cache.sqlite"), attempts=2)
    config = run_file(tmp_path, {"endpoint": "keel", "model": judge_model})
    with owned_judges(config, TINY) as resolved:
        rewards = resolved.domains["letters"].rewards
        assert rewards is not None
        (reward,) = rewards
        assert resolved.rewards == config.rewards and reward.kwargs["model"] == judge_model
        endpoint = reward.kwargs["endpoint"]
        results = asyncio.run(_judge_all(endpoint, judge_model, access))
        assert asyncio.run(_judge_all(endpoint, judge_model, access)) == results, "from the cache"
        _check_report(endpoint, judge_model, access, tmp_path)
    assert not answers(endpoint)
    assert "judgements 6, abstentions 0" in capsys.readouterr().out


async def _judge_all(endpoint: str, model: str, access: Access) -> list[RewardResult]:
    """Eight scores and a comparison of three."""
    samplings = [SAMPLING.model_copy(update={"seed": seed}) for seed in range(8)]
    calls = [
        rubric_judge(TASK, answer(f"Answer {i}."), endpoint=endpoint, model=model, sampling=sampling, access=access)
        for i, sampling in enumerate(samplings)
    ]
    results = await asyncio.gather(*calls)
    for result in results:
        accuracy, clarity = result.parts["accuracy"] * 10, result.parts["clarity"] * 4
        assert accuracy == pytest.approx(round(accuracy)) and clarity == pytest.approx(round(clarity))
        assert 0 <= result.value <= 1 and (result.value == 0 if result.parts["manipulation"] else True)
    assert len({result.parts["accuracy"] for result in results}) > 1, "a random model at temperature 1"
    answers = [answer(text) for text in ("One.", "Two.", "Three.")]
    compared = await rubric_compare(
        TASK, answers, endpoint=endpoint, model=model, opponents=2, sampling=SAMPLING, access=access
    )
    assert all(isinstance(result, RewardResult) and 0 <= result.value <= 1 for result in compared)
    return [*results, *(result for result in compared if isinstance(result, RewardResult))]


def _check_report(endpoint: str, model: str, access: Access, folder: Path) -> None:
    rows = [{"prompt": "p", "rubric": CRITERIA, "completion": text, "label": 1} for text in ("yes", "no")]
    file = folder / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = report(file, endpoint=endpoint, model=model, repeats=3, sampling=SAMPLING, access=access)
    assert result["rows"]["total"]["items"] == result["rows"]["total"]["labelled"] == 2


@pytest.mark.slow
def test_serve_prints_its_endpoint_and_stops_on_ctrl_c(judge_model: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom grpo.judge import serve\nfrom tests.rewards.test_judge_server import TINY\n"
        f"serve({judge_model!r}, port=int(sys.argv[1]), options=TINY)\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    output = (tmp_path / "out").open("w+")
    served = subprocess.Popen([sys.executable, "-c", code, port], stdout=output, stderr=output, start_new_session=True)
    endpoint = f"http://127.0.0.1:{port}/v1"
    assert until(lambda: "endpoint" in (tmp_path / "out").read_text() or served.poll() is not None, 240)
    assert f"endpoint  {endpoint}" in (tmp_path / "out").read_text() and answers(endpoint)
    os.killpg(served.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    assert served.wait(30) == 0
    assert not answers(endpoint)
    assert (tmp_path / "out").read_text().splitlines()[-1] == "stopped"


@pytest.mark.slow
def test_server_that_does_not_come_up_shows_the_end_of_its_log(tmp_path: Path) -> None:
    message = r"ended with code 1:(.|\n)*all of it: .*server\.log"
    with pytest.raises(JudgeServerError, match=message), judge_server(str(tmp_path / "nothing"), options=TINY):
        raise AssertionError("started")
