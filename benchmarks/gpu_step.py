"""One whole RL step, engines and learner ranks sharing GPUs in pairs: where the time and the memory go.

    python -m benchmarks.gpu_step --model dense-0.6b
    python -m benchmarks.gpu_step --model moe-1.1b --ahead 1
    python -m benchmarks.gpu_step --model moe-1.1b --ranks 2 --engines 2
    python -m benchmarks.gpu_step --model moe-1.1b --ranks 2 --tensor-parallel 2

A random model of real widths, 32 prompts x 8 samples, 128 prompt + 512 completion tokens, top_p 0.95: the same step
that TRL 1.16 with colocated vLLM was measured on (16.2 s on one H200). Prints the median of the steps after the
warm-up. Where engines and ranks cannot go in pairs, or an engine has several GPUs, each has its own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import tomli_w
import torch

from benchmarks.gpu_models import make_model, write_tasks
from benchmarks.machine import describe_machine
from grpo.config import load_config
from grpo.records.metrics import read_metrics
from grpo.train import train

NUM_WARM_UP = 2
REWARD = """
import zlib

def parity(task, answer):
    return float(zlib.crc32(answer.text.encode()) % 2)
"""
ROWS = (
    "time/step_s",
    "time/generate_s",
    "time/score_s",
    "time/train_s",
    "time/sync_s",
    "sync/gib_per_s",
    "time/probe_s",
    "rollout/tokens",
    "rollout/tokens_per_s",
    "rollout/kept_mean",
    "learner/tokens_per_s",
    "learner/peak_memory_gib",
    "mismatch/mean_abs",
    "mismatch/p99_abs",
    "mismatch/max_abs",
    "mismatch/route_agreement",
    "parity/max_mean_abs",
    "train/ratio_mean",
)


def main() -> None:
    """Parses the arguments, runs the steps and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("dense-0.6b", "moe-1.1b"), default="dense-0.6b")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=1, help="learner.ranks")
    parser.add_argument("--engines", type=int, default=1, help="rollout.workers")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs per engine")
    parser.add_argument("--ahead", type=int, default=0, help="max_off_policy_steps")
    parser.add_argument("--sleep", action="store_true", help="the engine gives its memory back while training")
    parser.add_argument("--memory-fraction", type=float, default=0.4, help="the engine's share of the GPU")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs in the engine")
    parser.add_argument("--microbatch", type=int, default=32768, help="packed tokens per forward")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--models", type=Path, help="keeps the model here: vLLM's compile cache goes by its path")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(arguments, Path(folder))
    print(f"gpu       {torch.cuda.get_device_name()}\n{describe_machine()}")
    print(f"{'copy bandwidth, GiB/s':26} {copy_bandwidth():12.5g}")
    for key in ROWS:
        values = [row[key] for row in rows[1 + NUM_WARM_UP :] if row.get(key) is not None]
        if values:
            print(f"{key:26} {statistics.median(values):12.5g}")


def run(arguments: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Trains a few steps in `folder` and returns the metrics rows, the first one from before the first step."""
    model = (arguments.models or folder) / arguments.model
    if not model.exists():
        make_model(arguments.model, model)
    write_tasks(folder / "tasks.jsonl", num_tasks=512, prompt_tokens=arguments.prompt_tokens)
    (folder / "reward.py").write_text(REWARD)
    run_file = folder / "run.toml"
    run_file.write_text(tomli_w.dumps(tables(arguments, folder, model)))
    started = time.perf_counter()
    run_dir = train(load_config(run_file), run_file=run_file)
    print(f"whole run {time.perf_counter() - started:.1f} s")
    return read_metrics(run_dir)


def copy_bandwidth() -> float:
    """GiB per second that a copy within the GPU's memory moves; each byte is read once and written once."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 1 / statistics.median(times)


def tables(arguments: argparse.Namespace, folder: Path, model: Path) -> dict[str, object]:
    """The run file."""
    length = arguments.prompt_tokens + arguments.new_tokens
    in_pairs = arguments.ranks == arguments.engines and arguments.tensor_parallel == 1
    return {
        "run": {"name": "gpu", "steps": arguments.steps, "output_dir": str(folder / "runs"), "tensorboard": False},
        "model": {"path": str(model.resolve())},
        "tasks": {"train": "tasks.jsonl", "max_prompt_tokens": arguments.prompt_tokens},
        "sampling": {"top_p": 0.95, "max_new_tokens": arguments.new_tokens},
        "grpo": {
            "group_size": 8,
            "prompts_per_step": arguments.prompts,
            "max_off_policy_steps": arguments.ahead,
        },
        "learner": {
            "ranks": arguments.ranks,
            "lr": 1e-6,
            "gradient_checkpointing": arguments.checkpointing,
            "max_tokens_per_microbatch": max(arguments.microbatch, length),
        },
        "rollout": {
            "workers": arguments.engines,
            "tensor_parallel_size": arguments.tensor_parallel,
            "gpu_memory_fraction": arguments.memory_fraction,
            "enforce_eager": arguments.eager,
            "sleep_while_training": arguments.sleep,
        },
        "cluster": {"layout": "colocated" if in_pairs else "disaggregated"},
        "rewards": [{"fn": "./reward.py:parity"}],
    }


if __name__ == "__main__":
    main()
