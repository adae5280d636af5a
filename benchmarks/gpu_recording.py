"""Engine tokens/s with both recordings on against none, on one GPU.

    python -m benchmarks.gpu_recording

256 concurrent sequences of 64 prompt and 256 new tokens from a random 1.1 B MoE, CUDA graphs on. Two nucleus widths
give
kept sets of different mean size with the same weights. Each setting is an engine of its own in a process of its own;
the
median of the repeats is printed, as a ratio to the run without recording.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_models import VOCAB_SIZE, make_model
from benchmarks.machine import describe_machine
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.types import Completion, GenerateRequest, Replay

NUM_SEQUENCES, PROMPT_TOKENS, NEW_TOKENS = 256, 64, 256
TOP_P = (0.5, 0.95)
NUM_REPEATS = 3


def main() -> None:
    """Measures every setting in a process of its own and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="moe-1.1b")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "RECORD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(asyncio.run(measure(arguments.child[0], arguments.child[1] == "both"))))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(arguments.model, Path(folder) / "model")
        results = {record: run_child(Path(folder) / "model", record) for record in ("none", "both")}
    print(f"gpu       {torch.cuda.get_device_name()}\n{describe_machine()}")
    for plain, recorded in zip(results["none"], results["both"], strict=True):
        ratio = recorded["tokens_per_s"] / plain["tokens_per_s"]
        print(
            f"top_p {recorded['top_p']:.2f}  mean kept set {recorded['kept_mean']:8.1f}  "
            f"none {plain['tokens_per_s']:9.0f} tokens/s  "
            f"both {recorded['tokens_per_s']:9.0f} tokens/s  ratio {ratio:.3f}"
        )


def run_child(model: Path, record: str) -> list[dict[str, float]]:
    """One setting's results, from its last line of output."""
    command = [sys.executable, "-m", "benchmarks.gpu_recording", "--child", str(model), record]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


async def measure(model: str, record: bool) -> list[dict[str, float]]:
    """Median tokens/s for each nucleus width."""
    config = RolloutConfig(gpu_memory_fraction=0.6, max_concurrent_sequences=NUM_SEQUENCES)
    length = PROMPT_TOKENS + NEW_TOKENS
    engine = Engine(model, config, max_model_len=length, record_kept=record, record_routing=record)
    results = []
    for top_p in TOP_P:
        speeds, kept = [], 0.0
        for repeat in range(NUM_REPEATS + 1):
            started = time.perf_counter()
            completions = await asyncio.gather(
                *(engine.generate(request(i, repeat, top_p)) for i in range(NUM_SEQUENCES))
            )
            drawn: list[Completion] = [completion for group in completions for completion in group]
            speeds.append(sum(c.num_tokens for c in drawn) / (time.perf_counter() - started))
            if record:
                kept = float(np.mean([mean_kept(c) for c in drawn]))
        results.append({"top_p": top_p, "tokens_per_s": statistics.median(speeds[1:]), "kept_mean": kept})
    engine.shutdown()
    return results


def mean_kept(completion: Completion) -> float:
    """Kept ids per sampled token."""
    replay: Replay = completion.replay
    assert replay.kept is not None
    return len(replay.kept.ids) / completion.num_tokens


def request(index: int, repeat: int, top_p: float) -> GenerateRequest:
    """A prompt of its own for every sequence and repeat, so that no prefix is cached."""
    prompt = np.random.default_rng([repeat, index]).integers(0, VOCAB_SIZE - 1, PROMPT_TOKENS).astype(np.int32)
    return GenerateRequest(prompt, (index,), 1.0, top_p, 0, NEW_TOKENS, ())


if __name__ == "__main__":
    main()
