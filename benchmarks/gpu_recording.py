"""Engine tokens/s with both recordings on, with none, and of vLLM as a user would run it, on one GPU.

    python -m benchmarks.gpu_recording
    python -m benchmarks.gpu_recording --model moe-30b-6l
    python -m benchmarks.gpu_recording --vllm

256 concurrent sequences of 64 prompt and 256 new tokens from a random model, CUDA graphs on. Each setting is an engine
of its own in a process of its own; all stand on the same GPU, and draw the same prompts in turn while the others rest:

- `none`: Keel's engine without recording; the reference of the ratios.
- `both`: Keel's engine, kept sets and routes (kept sets alone for a dense model).
- `vllm`: vLLM's `LLM` with its own scheduler and its own recording, at top_k = 512, which it needs. Measured once.

The nucleus widths are searched for sets of about 8 and 80 ids; the last row does not truncate. Every width is warmed up
before it is measured. Keel's engines draw the same batch at the same time, in turns of some steps: while one has its
turn, the other rests, and only its own turns count. For where the host sets the pace, its speed changes by tens of
percent within seconds. The threads that drive them share a core, since those of a shared machine are not equally fast.
"ratio" is an engine's tokens/s by those of `none` in the same turns, the median over the repeats and the quartiles.
"waits" is the time per step in which such a thread waits for the GPU: where there is none, the host sets the pace.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.gpu_models import SHAPES, VOCAB_SIZE, make_model
from benchmarks.machine import describe_machine
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.types import Completion, GenerateRequest, KeptSets

NUM_SEQUENCES, PROMPT_TOKENS, NEW_TOKENS = 256, 64, 256
SET_SIZES = (8, 80)
SEARCH_STEPS, SEARCH_TOKENS = 7, 12
NUM_REPEATS = 25
TURN_STEPS = 32
KV_CACHE_GIB = 4.0
MEMORY_FRACTION = 0.2
VLLM_TOP_K = 512

_engine: Any = None
_turns: Turns | None = None
_waited_s = 0.0
"""How long this process's engine has waited for the GPU."""


class Drawn(NamedTuple):
    """One batch of all sequences."""

    tokens_per_s: float
    step_ms: float
    wait_ms: float
    kept_mean: float


class Turns:
    """The turns of this process's engine: while it has one, the other's rests. Both take as many turns per batch."""

    def __init__(self, mine: Semaphore, others: Semaphore) -> None:
        self._mine, self._others = mine, others
        self._num_steps = 0
        self._num_left = 0
        self._started = self.seconds = 0.0
        """`seconds` is the time of this batch's turns so far."""

    @contextmanager
    def batch(self) -> Iterator[None]:
        """The last turn lasts until the batch is finished."""
        self._num_left, self.seconds = NEW_TOKENS // TURN_STEPS, 0.0
        self._begin()
        yield
        self._end()

    def count_step(self) -> None:
        """To be called before each step."""
        if self._num_steps == TURN_STEPS and self._num_left:
            self._end()
            self._begin()
        self._num_steps += 1

    def _begin(self) -> None:
        self._mine.acquire()
        self._num_left -= 1
        self._num_steps, self._started = 0, time.perf_counter()

    def _end(self) -> None:
        torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._started
        self._others.release()


def main() -> None:
    """Starts the engines side by side, lets them draw in turn, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="moe-1.1b")
    parser.add_argument("--vllm", action="store_true", help="measure vLLM's own recording too")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    first, second = context.Semaphore(1), context.Semaphore(0)
    turns = {"none": (first, second), "both": (second, first)}
    pools = {name: ProcessPoolExecutor(1, context, take_turns, pair) for name, pair in turns.items()}
    if arguments.vllm:
        pools["vllm"] = ProcessPoolExecutor(1, context)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(arguments.model, Path(folder) / "model")
        torch.cuda.empty_cache()
        for started in [pool.submit(start, name, str(model)) for name, pool in pools.items()]:
            started.result()
        print(f"gpu       {torch.cuda.get_device_name()}\n{describe_machine()}", flush=True)
        for top_p in [*(find_width(pools["both"], size) for size in SET_SIZES), 1.0]:
            print_width(arguments.model, top_p, measure(pools, top_p))
    for pool in pools.values():
        pool.submit(stop).result()
        pool.shutdown()


def measure(pools: dict[str, ProcessPoolExecutor], top_p: float) -> dict[str, list[Drawn]]:
    """The repeats of every setting, after one that is left out."""
    rows: dict[str, list[Drawn]] = {name: [] for name in pools}
    for repeat in range(NUM_REPEATS + 1):
        for name, drawn in [
            (name, pools[name].submit(draw, top_p, repeat, in_turns=True)) for name in ("none", "both")
        ]:
            rows[name].append(drawn.result())
    if "vllm" in pools:
        rows["vllm"] = [pools["vllm"].submit(draw, top_p, repeat).result() for repeat in (0, 1)]
    return {name: repeats[1:] for name, repeats in rows.items()}


def print_width(model: str, top_p: float, rows: dict[str, list[Drawn]]) -> None:
    """One width: medians and fastest repeats, with ratios to the engine that records nothing."""
    kept = f"mean kept set {rows['both'][0].kept_mean:.1f}" if top_p < 1 else "nothing truncated"
    print(f"\n{model}, top_p {top_p:.4f}, {kept}")
    for name, repeats in rows.items():
        speed = [drawn.tokens_per_s for drawn in repeats]
        ratios = [ours / none.tokens_per_s for ours, none in zip(speed, rows["none"], strict=False)]
        lower, ratio, upper = np.quantile(ratios, (0.25, 0.5, 0.75))
        step, waits = (statistics.median(times) for times in zip(*(drawn[1:3] for drawn in repeats), strict=True))
        print(
            f"{name:5} {statistics.median(speed):9.0f} tokens/s (fastest {max(speed):6.0f})  {step:5.2f} ms/step  "
            f"waits {waits:5.2f}  ratio {ratio:.3f} ({lower:.3f} to {upper:.3f})",
            flush=True,
        )


def find_width(pool: ProcessPoolExecutor, size: float) -> float:
    """A top_p with sets of about `size` ids on average, by bisection over short answers."""
    low, high = 0.05, 0.999
    for _ in range(SEARCH_STEPS):
        width = (low + high) / 2
        mean = pool.submit(draw, width, 0, SEARCH_TOKENS).result().kept_mean
        low, high = (width, high) if mean < size else (low, width)
    return (low + high) / 2


# -- in an engine's process ----------------------------------------------------------------------------------------


def take_turns(mine: Semaphore, others: Semaphore) -> None:
    """Prepares this process."""
    global _turns
    _turns = Turns(mine, others)


def start(setting: str, model: str) -> None:
    """Builds this process's engine, and lets it compile and start in its first batch what it does not start with."""
    global _engine
    length = PROMPT_TOKENS + NEW_TOKENS
    if setting == "vllm":
        _engine = start_vllm(model, length)
    else:
        config = RolloutConfig(
            gpu_memory_fraction=MEMORY_FRACTION, kv_cache_gib=KV_CACHE_GIB, max_concurrent_sequences=NUM_SEQUENCES
        )
        record = setting == "both"
        _engine = Engine(model, config, max_model_len=length, record_kept=record, record_routing=record)
        count_waiting()
        count_steps(_engine)
    draw(0.9, 0)
    if setting != "vllm":
        asyncio.run(_engine._ask(lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})))  # its thread alone


def count_waiting() -> None:
    """Has this process count the time that it spends in waiting for a CUDA event, which is how an engine waits."""
    wait = torch.cuda.Event.synchronize

    def synchronize(self: torch.cuda.Event) -> None:
        global _waited_s
        started = time.perf_counter()
        wait(self)
        _waited_s += time.perf_counter() - started

    torch.cuda.Event.synchronize = synchronize


def count_steps(engine: Engine) -> None:
    """Has an engine take its turns."""
    step = engine._step

    def counted() -> None:
        assert _turns is not None
        _turns.count_step()
        step()

    engine._step = counted


def start_vllm(model: str, length: int) -> Any:
    """vLLM as it is, both of its recordings on."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import vllm

    return vllm.LLM(
        model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        generation_config="vllm",
        max_model_len=length,
        max_num_seqs=NUM_SEQUENCES,
        gpu_memory_utilization=MEMORY_FRACTION,
        kv_cache_memory_bytes=int(KV_CACHE_GIB * 2**30),
        logprobs_mode="processed_logprobs",
        return_sampling_mask=True,
        enable_return_routed_experts="moe" in json.loads(Path(model, "config.json").read_text())["model_type"],
    )


def stop() -> None:
    """Frees this process's engine."""
    if isinstance(_engine, Engine):
        _engine.shutdown()


def draw(top_p: float, repeat: int, num_tokens: int = NEW_TOKENS, *, in_turns: bool = False) -> Drawn:
    """One batch of all sequences; prompts of their own for every sequence and repeat, so that no prefix is cached."""
    generators = (np.random.default_rng([repeat, num_tokens, i]) for i in range(NUM_SEQUENCES))
    prompts = [generator.integers(0, VOCAB_SIZE - 1, PROMPT_TOKENS) for generator in generators]
    if isinstance(_engine, Engine):
        return draw_with_keel(_engine, prompts, top_p, num_tokens, _turns if in_turns else None)
    return draw_with_vllm(prompts, top_p, num_tokens)


def draw_with_keel(
    engine: Engine, prompts: list[np.ndarray], top_p: float, num_tokens: int, turns: Turns | None
) -> Drawn:
    async def run() -> list[tuple[Completion, ...]]:
        requests = (
            GenerateRequest(prompt.astype(np.int32), (i,), 1.0, top_p, 0, num_tokens, ())
            for i, prompt in enumerate(prompts)
        )
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    waited, steps, started = _waited_s, engine.stats().num_steps, time.perf_counter()
    with nullcontext() if turns is None else turns.batch():
        groups = asyncio.run(run())
    seconds = time.perf_counter() - started if turns is None else turns.seconds
    waited, steps = _waited_s - waited, engine.stats().num_steps - steps
    completions = [completion for group in groups for completion in group]
    if errors := {error for c in completions if (error := c.find_record_error(PROMPT_TOKENS))}:
        raise RuntimeError(f"records do not hold together: {errors}")
    sets = [c.replay.kept for c in completions if isinstance(c.replay.kept, KeptSets)]
    kept_mean = sum(len(kept.ids) for kept in sets) / sum(map(len, sets)) if sets else float("nan")
    num_drawn = sum(c.num_tokens for c in completions)
    return Drawn(num_drawn / seconds, seconds / steps * 1e3, waited / steps * 1e3, kept_mean)


def draw_with_vllm(prompts: list[np.ndarray], top_p: float, num_tokens: int) -> Drawn:
    """vLLM drives its engine in a process of its own, whose time is not seen here."""
    from vllm import SamplingParams

    common: dict[str, Any] = {"top_p": top_p, "top_k": VLLM_TOP_K, "max_tokens": num_tokens, "ignore_eos": True}
    params = [SamplingParams(**common, seed=i, logprobs=0, detokenize=False) for i in range(len(prompts))]
    started = time.perf_counter()
    outputs = _engine.generate([{"prompt_token_ids": p.tolist()} for p in prompts], params, use_tqdm=False)
    speed = sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - started)
    return Drawn(speed, len(prompts) / speed * 1e3, float("nan"), float("nan"))


if __name__ == "__main__":
    main()
