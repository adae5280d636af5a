"""The whole loop on real Ray and real vLLM, with faults injected into real processes."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray.exceptions import RayTaskError
from safetensors.torch import load_file

from grpo.assembly import make_cluster
from grpo.checkpoint import list_checkpoints, read_trainer_state
from grpo.config import load_config
from grpo.parity import ParityError
from grpo.preflight import check
from grpo.records.metrics import read_metrics, read_rows
from grpo.train import train
from rollout.types import Completion, GenerateRequest
from rollout.vllm_plugin import register
from rollout.weight_sync import WeightBucket, pack_buckets, unpack_bucket
from rollout.worker import RolloutWorker
from tests.toy import write_run

REPOSITORY = Path(__file__).parents[1]
NUM_STEPS = 8
LONGER = {"run": {"steps": NUM_STEPS, "checkpoint_every": 2}, "sampling": {"max_new_tokens": 24}}
"""Settings of the runs that are compared with one another."""


class CorruptingWorker(RolloutWorker):
    """Swaps two experts of the first layer in every weight sync but the first."""

    num_syncs = 0

    async def begin_weight_update(self) -> None:
        self.num_syncs += 1
        await super().begin_weight_update()

    async def load_weights(self, bucket: WeightBucket) -> None:
        if self.num_syncs > 1:
            swap = {
                "layers.0.mlp.experts.0.": "layers.0.mlp.experts.1.",
                "layers.0.mlp.experts.1.": "layers.0.mlp.experts.0.",
            }
            tensors = [(_swapped(name, swap), tensor) for name, tensor in unpack_bucket(bucket)]
            (bucket,) = pack_buckets(tensors, max_bytes=1 << 30)
        await super().load_weights(bucket)


def _swapped(name: str, swap: dict[str, str]) -> str:
    for old, new in swap.items():
        if old in name:
            return name.replace(old, new)
    return name


def test_a_corrupted_sync_is_caught_by_the_probe_and_stops_the_run(ray_address, toy_model, tmp_path):
    run_file = write_run(tmp_path, toy_model, cluster={"address": ray_address})
    config = load_config(run_file)
    with pytest.raises(ParityError, match=r"rollout worker 0 does not hold the learner's weights .* version 1"):
        train(config, run_file=run_file, worker_class=CorruptingWorker)
    assert [row["step"] for row in read_metrics(config.run_dir)] == [0], "nothing may be trained on a corrupt engine"


class PatientWorker(RolloutWorker):
    """Ends no update before all groups of the next step have been asked for, and holds the first probe's samples back
    until a group has been drawn."""

    num_updates = num_probes = num_groups = 0

    async def finish_weight_update(self, policy_version: int) -> None:
        self.group_came = asyncio.Event() if self.num_updates == 0 else self.group_came
        self.num_updates += 1
        async with asyncio.timeout(20):
            while self.num_groups < 6 * min(self.num_updates, NUM_STEPS):
                await asyncio.sleep(0.01)
        await super().finish_weight_update(policy_version)

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        is_probe = len(request.seeds) != 4
        self.num_probes += is_probe
        self.num_groups += not is_probe
        completions = await super().generate(request)
        if not is_probe:
            assert self.num_probes >= 4, "the probe's requests come first"
            self.group_came.set()
        elif self.num_updates == 1:
            await asyncio.wait_for(self.group_came.wait(), 20)
        return completions


@pytest.fixture(scope="module")
def patient_run(ray_address: str, toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    run_file = write_run(tmp_path_factory.mktemp("patient"), toy_model, cluster={"address": ray_address}, **LONGER)
    return train(load_config(run_file), run_file=run_file, worker_class=PatientWorker)


def test_the_next_groups_are_asked_for_during_the_sync_and_drawn_beside_the_probe(patient_run):
    rows = read_metrics(patient_run)
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1)) and rows[-1]["train/staleness_max"] == 0


class BreakingWorker(RolloutWorker):
    """The first engine to be asked for so many groups fails in a step while it draws them."""

    num_asked = 0

    def __init__(self, model_path: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(model_path, *args, **kwargs)
        self._broken = Path(model_path).parent / "broken"

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        self.num_asked += len(request.seeds) == 4
        if self.num_asked == 8:
            with suppress(FileExistsError):
                self._broken.touch(exist_ok=False)
                self._engine._llm.step = self._fail
        return await super().generate(request)

    def _fail(self) -> None:
        raise ZeroDivisionError("a kernel failed")


@pytest.mark.parametrize(("cause", "ranks"), [("a killed process", 1), ("an engine that fails", 2)])
def test_a_lost_worker_is_replaced_and_no_sample_is_lost_or_doubled(cause, ranks, ray_address, toy_model, tmp_path):
    run_file = write_run(
        tmp_path,
        Path(shutil.copytree(toy_model, tmp_path / "model")),
        cluster={"address": ray_address},
        run={"steps": 5},
        learner={"ranks": ranks},
        rollout={"workers": 2, "max_concurrent_sequences": 4},
        sampling={"max_new_tokens": 48},
    )
    config = load_config(run_file)
    if cause == "a killed process":
        killed: list[int] = []
        watcher = threading.Thread(target=_kill_a_worker_after_step, args=(config.run_dir, 1, killed), daemon=True)
        watcher.start()
        train(config, run_file=run_file)
        watcher.join(timeout=10)
        assert len(killed) == 1
    else:
        train(config, run_file=run_file, worker_class=BreakingWorker)
    rows = read_metrics(config.run_dir)
    assert rows[-1]["rollout/worker_restarts"] == 1
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    for row in rows[1:]:
        dropped = 4 * row["train/zero_signal_groups"] + row["train/dropped_samples"]
        assert row["train/num_samples"] + dropped == 24
        assert row["mismatch/mean_abs"] < 1e-5
    groups = {(sample["group"], sample["step"]) for sample in read_rows(config.run_dir / "samples.jsonl")}
    assert sorted(group for group, _ in groups) == list(range(30)), "every group is trained on once"


def _kill_a_worker_after_step(run_dir: Path, step: int, killed: list[int]) -> None:
    while not any(row["step"] >= step for row in read_metrics(run_dir)):
        time.sleep(0.02)
    workers = [p for p in psutil.process_iter(["cmdline"]) if "RolloutActor" in " ".join(p.info["cmdline"] or [])]
    victim = max(workers, key=lambda p: p.create_time())
    os.kill(victim.pid, signal.SIGKILL)
    killed.append(victim.pid)


def test_in_flight_updates_keep_the_bound_and_the_records(ray_address, toy_model, tmp_path):
    run_file = write_run(
        tmp_path,
        toy_model,
        cluster={"address": ray_address},
        run={"steps": 6},
        grpo={"max_off_policy_steps": 2},
        sampling={"max_new_tokens": 48},
        learner={"lr": 1e-4},
    )
    config = load_config(run_file)
    train(config, run_file=run_file)
    rows = read_metrics(config.run_dir)[1:]
    assert max(row["train/staleness_max"] for row in rows) == 2
    assert all(row["parity/max_mean_abs"] < 1e-5 and row["mismatch/mean_abs"] < 1e-5 for row in rows)
    assert all(row["train/dropped_samples"] == 0 for row in rows)
    # A mixed record would show here: with the right supports and routes the small steps keep ratios near one.
    assert all(abs(row["train/ratio_mean"] - 1) < 0.05 for row in rows)


def test_stopped_and_killed_runs_resume_bit_equal_to_an_uninterrupted_one(
    patient_run, ray_address, toy_model, tmp_path
):
    run_file = write_run(tmp_path, toy_model, cluster={"address": ray_address}, **LONGER)
    run_dir = load_config(run_file).run_dir

    interrupted = _run_and_signal(run_file, signal.SIGINT, lambda: _last_step(run_dir) >= 1)
    assert interrupted.returncode == 0 and "continue with --resume" in interrupted.stdout
    stopped_at = read_trainer_state(list_checkpoints(run_dir)[-1]).step
    assert 1 <= stopped_at < NUM_STEPS

    killed = _run_and_signal(run_file, signal.SIGKILL, lambda: _last_step(run_dir) > max(2, stopped_at), "--resume")
    assert killed.returncode == -signal.SIGKILL
    half = run_dir / "checkpoints" / ".partial-step-000008"
    (half / "learner").mkdir(parents=True, exist_ok=True)
    last = read_trainer_state(list_checkpoints(run_dir)[-1]).step

    train(load_config(run_file), run_file=run_file, resume=True)
    assert last < NUM_STEPS and not half.exists()
    expected, rows = read_metrics(patient_run), read_metrics(run_dir)
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == list(range(NUM_STEPS + 1))
    for row, wanted in zip(rows[1:], expected[1:], strict=True):
        for key in (
            "train/reward",
            "train/loss",
            "train/grad_norm",
            "train/kl",
            "mismatch/mean_abs",
            "train/ratio_mean",
        ):
            assert row[key] == wanted[key], f"step {row['step']}: {key}"
    models = [load_file(folder / "model" / "model.safetensors") for folder in (patient_run, run_dir)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def _last_step(run_dir: Path) -> int:
    return max((row["step"] for row in read_metrics(run_dir)), default=-1)


def _run_and_signal(
    run_file: Path, number: signal.Signals, when: Callable[[], bool], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Starts `keel train` as a process of its own, sends it a signal when the time has come, and waits for its end."""
    command = [sys.executable, "-c", "from grpo.cli import main; main()", "train", str(run_file), *arguments]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, output, "")


class WaitingWorker(RolloutWorker):
    """Comes up when a file lies beside the model; there vLLM has its cache, too."""

    def __init__(self, model_path: str, *arguments: Any, **keywords: Any) -> None:
        self._folder = Path(model_path).parent
        os.environ["VLLM_CACHE_ROOT"] = str(self._folder / "cache")
        register()  # imports vLLM, which takes longest, while the learner reads its model
        while not (self._folder / "come-up").exists():
            time.sleep(0.02)
        super().__init__(model_path, *arguments, **keywords)

    async def begin_weight_update(self) -> None:
        (self._folder / "frozen").write_text(str(gc.get_freeze_count()))
        await super().begin_weight_update()


def test_the_learner_takes_its_gpu_memory_after_the_engines_have(ray_address, toy_model, tmp_path):
    """vLLM measures free memory while it starts: it must not change under it."""
    model = Path(shutil.copytree(toy_model, tmp_path / "model"))
    run_file = write_run(tmp_path, model, cluster={"address": ray_address})
    config = load_config(run_file)
    cluster = make_cluster(config, check(config, run_file), worker_class=WaitingWorker)

    async def bring_up() -> None:
        starting = asyncio.create_task(cluster.start())
        while not hasattr(cluster, "_ranks"):
            await asyncio.sleep(0.02)
        (rank,) = cluster._ranks
        await rank.free_address.remote()  # answers when it has read the model
        await asyncio.sleep(0.5)
        with pytest.raises(RayTaskError, match="no attribute '_learner'"):
            await rank.policy_version.remote()
        (tmp_path / "come-up").touch()
        await starting
        assert (await cluster.sync_weights()).policy_version == 0
        assert int((tmp_path / "frozen").read_text()) > 100_000, "modules must not be searched for garbage in a step"
        # vLLM keeps what another process has told it about a model: here there is nothing to keep.
        assert not list(tmp_path.glob("cache/modelinfos/*")), "the model was looked at in a process of its own"

    try:
        asyncio.run(bring_up())
    finally:
        cluster.shutdown()
