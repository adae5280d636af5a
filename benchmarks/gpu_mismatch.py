"""What keeps the learner's log-probabilities from being the engine's: |log pi_theta - log pi_old| on the same weights.

    python -m benchmarks.gpu_mismatch                                        # a random 1.1 B MoE
    python -m benchmarks.gpu_mismatch --trained FOLDER --tasks tasks.jsonl   # a trained one, on its own prompts

An engine (bfloat16, recording) draws completions; the learner (bfloat16, float32 masters) scores them, with the causes
of the difference closed one after another: kept sets replayed, experts replayed, logits in float32, routers and
residual stream in float32 (rollout/vllm_plugin/precision.py, grpo/policy/layers/decoder.py). Yardsticks tell what is
left to gain: the learner against itself through other kernels, the engine against itself with another batch size, and
what each kind of rounding does alone. The engines start side by side, each in a process of its own, and draw one after
the other; their speed is measured on `SPEED_SEQUENCES` sequences at once.
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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer

from benchmarks.gpu_models import SHAPES, make_model
from benchmarks.machine import describe_machine
from benchmarks.mismatch_learner import CHANGES, ROUNDINGS, Change, cast_parameters, plain_experts, plain_layers
from grpo.advantage import Objective, TrainSample, completion_segment
from grpo.batch import pack, plan_updates
from grpo.logprobs import token_logprobs
from grpo.policy.layers.attention import set_attention
from grpo.policy.model import PolicyModel, load_policy, reshard, shard_policy
from rollout.config import RolloutConfig
from rollout.engine import Engine
from rollout.types import Completion, GenerateRequest, Replay

PROMPT_TOKENS, NEW_TOKENS, TOP_P = 64, 192, 0.95
SPEED_SEQUENCES, SPEED_REPEATS = 256, 3
KV_CACHE_GIB = 6.0
SUMS = ("bfloat16", "float32")
FEW = 8
"""Sequences at once in the second drawing of the same requests."""
MICROBATCH_TOKENS = 16384
BOTH = "kept sets, routes"
ALONE = 64
"""So many sequences are scored one by one, through the other kernels."""
OBJECTIVE = Objective(beta=0.0, delta=None, eps_low=0.2, eps_high=0.2, temperature=1.0)

_engine: Any = None


@dataclass(frozen=True, slots=True)
class Draw:
    """What one engine setting drew."""

    head: str
    sums: str
    """Routers and residual stream."""
    completions: tuple[Completion, ...]
    tokens_per_s: float

    @property
    def label(self) -> str:
        return f"logits {self.head}, sums {self.sums}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SHAPES), default="moe-1.1b")
    parser.add_argument("--trained", type=Path, help="a model folder instead of a random model")
    parser.add_argument("--tasks", type=Path, help="a .jsonl file of prompts instead of random token ids")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs in the engine")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.trained is None:
            arguments.trained = make_model(arguments.model, Path(folder) / "model")
        draws = run_engines(arguments)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        print(f"gpu       {gpu}\n{describe_machine()}\n")
        report(arguments.trained, make_requests(arguments, arguments.sequences), draws)


# -- the engine --------------------------------------------------------------------------------------------------------


def make_requests(arguments: argparse.Namespace, count: int, first: int = 0) -> list[GenerateRequest]:
    """Requests number `first` to `first + count`, one completion each: prompts of a task file to the end of their
    answers, or random token ids, drawn to their full length and never cached."""
    config = json.loads((arguments.trained / "config.json").read_text())
    indices = range(first, first + count)
    if arguments.tasks is None:
        prompts = [np.random.default_rng(i).integers(0, config["vocab_size"] - 1, PROMPT_TOKENS) for i in indices]
        stop = ()
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.trained)
        texts = [json.loads(line)["prompt"] for line in arguments.tasks.read_text().splitlines()]
        prompts = [np.array(tokenizer(texts[i % len(texts)]).input_ids) for i in indices]
        stop = (config["eos_token_id"],)
    return [
        GenerateRequest(prompt.astype(np.int32), (i,), 1.0, TOP_P, 0, arguments.new_tokens, stop)
        for i, prompt in zip(indices, prompts, strict=True)
    ]


def run_engines(arguments: argparse.Namespace) -> list[Draw]:
    """Everything that is drawn, by engines with either kind of sums."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in SUMS]
        starts = [pool.submit(start_engine, arguments, sums) for pool, sums in zip(pools, SUMS, strict=True)]
        for start in starts:
            start.result()
        drawn = [pool.submit(draw_all, arguments, sums).result() for pool, sums in zip(pools, SUMS, strict=True)]
    return [draw for draws in drawn for draw in draws]


def start_engine(arguments: argparse.Namespace, sums: str) -> None:
    """Builds this process's engine."""
    global _engine
    os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"  # the cache does not tell the two kinds apart
    choose_sums(sums)
    requests = make_requests(arguments, arguments.sequences)
    length = max(len(request.prompt_token_ids) for request in requests) + arguments.new_tokens
    config = RolloutConfig(
        gpu_memory_fraction=0.3,
        kv_cache_gib=KV_CACHE_GIB,
        enforce_eager=arguments.eager,
        max_concurrent_sequences=SPEED_SEQUENCES,
    )
    _engine = Engine(str(arguments.trained), config, max_model_len=length, record_kept=True, record_routing=True)


def draw_all(arguments: argparse.Namespace, sums: str) -> list[Draw]:
    """The same requests with both kinds of output layer, and once more a few at a time; the engine is gone then."""
    draws = asyncio.run(_draw_all(arguments, sums))
    _engine.shutdown()
    return draws


async def _draw_all(arguments: argparse.Namespace, sums: str) -> list[Draw]:
    requests, draws = make_requests(arguments, arguments.sequences), []
    for head in ("bfloat16", "float32"):
        await choose_head(_engine, head)
        completions = await draw(_engine, requests, len(requests))
        speed = await measure_speed(_engine, arguments) if torch.cuda.is_available() else float("nan")
        draws.append(Draw(head, sums, completions, speed))
    return [*draws, Draw(f"float32, {FEW} at a time", sums, await draw(_engine, requests, FEW), float("nan"))]


async def draw(engine: Engine, requests: Sequence[GenerateRequest], at_once: int) -> tuple[Completion, ...]:
    """One completion per request."""
    drawn: list[Completion] = []
    for start in range(0, len(requests), at_once):
        groups = await asyncio.gather(*(engine.generate(r) for r in requests[start : start + at_once]))
        drawn += [completion for group in groups for completion in group]
    return tuple(drawn)


async def measure_speed(engine: Engine, arguments: argparse.Namespace) -> float:
    """Median tokens/s."""
    speeds = []
    for repeat in range(1, SPEED_REPEATS + 1):
        requests = make_requests(arguments, SPEED_SEQUENCES, repeat * 10_000)
        started = time.perf_counter()
        completions = await draw(engine, requests, SPEED_SEQUENCES)
        speeds.append(sum(c.num_tokens for c in completions) / (time.perf_counter() - started))
    return statistics.median(speeds)


def choose_sums(sums: str) -> None:
    """Routers and norms of the models built from here on in this process: vLLM's own, or those of the plug-in."""
    from vllm.model_executor.custom_op import op_registry_oot

    from rollout.vllm_plugin import ENGINE_VARIABLE, register
    from rollout.vllm_plugin.precision import keep_float32_sums

    os.environ[ENGINE_VARIABLE] = "1"
    register()  # the engine will not do it again
    for name in ("GateLinear", "RMSNorm"):
        op_registry_oot.pop(name, None)
    if sums == "float32":
        keep_float32_sums()


async def choose_head(engine: Engine, head: str) -> None:
    """Output layer of a running engine; it is no part of the CUDA graphs."""
    await engine._ask(lambda: engine._llm.collective_rpc(_set_head, args=(getattr(torch, head),)))


def _set_head(wrapper: Any, dtype: torch.dtype) -> None:
    wrapper.worker.model_runner.model.logits_processor.head_dtype = dtype


# -- the learner -------------------------------------------------------------------------------------------------------


def report(folder: Path, requests: Sequence[GenerateRequest], draws: Sequence[Draw]) -> None:
    """Scores every drawing and prints two tables: against the engine, and what two right computations differ by."""
    by_setting = {(d.head, d.sums): d for d in draws}
    baseline, best = by_setting["bfloat16", "bfloat16"], by_setting["float32", "float32"]
    logits = by_setting["float32", "bfloat16"]
    print("| engine | learner | mean | 99 % | max | own routes agree | engine tokens/s |\n" + "|---" * 7 + "|")
    sharded = load_sharded(folder)
    for drawn in (baseline, logits, best):
        samples = to_samples(requests, drawn.completions)
        with (CHANGES["as it is"] if drawn is best else plain_layers)(sharded):
            for replay in ("nothing replayed", "kept sets", BOTH):
                print_row(drawn, replay, score(sharded, samples, replay), samples, agreement(sharded, replay))
    del sharded
    policy = load_policy(folder, keep_routing=True, gradient_checkpointing=False)
    nn.Module.to(policy.module, device())
    samples = to_samples(requests, logits.completions)
    print_row(logits, f"{BOTH}; all in float32", score(policy, samples), samples)
    samples = to_samples(requests, best.completions)
    exact = score(policy, samples)
    rounded = {name: score_with(change, policy, samples) - exact for name, change in ROUNDINGS.items()}
    cast_parameters(policy.module, torch.bfloat16)
    for names, change in CHANGES.items():
        print_row(best, f"{BOTH}; {names}", score_with(change, policy, samples), samples)
    print_row(best, f"{BOTH}; all in float32", exact, samples)
    print("\n| two computations of one log-probability | mean | 99 % | max |\n" + "|---" * 4 + "|")
    print_yardsticks(policy, samples, exact, by_setting)
    for name, difference in rounded.items():
        print(f"| learner in float32 against itself with one rounding to bfloat16: {name} | {figures(difference)} |")


def print_yardsticks(
    policy: PolicyModel, samples: Sequence[TrainSample], exact: np.ndarray, draws: dict[tuple[str, str], Draw]
) -> None:
    """Learner and engine against themselves."""
    own = score(policy, samples)
    print(f"| learner in bfloat16 against itself in float32 | {figures(own - exact)} |")
    alone = score_alone(policy, samples[:ALONE])
    print(f"| learner packed against one by one, with other kernels | {figures(own[: len(alone)] - alone)} |")
    for sums in SUMS:
        many, few = draws["float32", sums], draws[f"float32, {FEW} at a time", sums]
        difference = common_difference(many.completions, few.completions)
        print(f"| engine (sums {sums}) all at once against {FEW} at a time | {figures(difference)} |")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_sharded(folder: Path) -> PolicyModel:
    """The policy as training holds it."""
    policy = load_policy(folder, keep_routing=True, gradient_checkpointing=False)
    shard_policy(policy, compute_dtype=torch.bfloat16, world_size=1)
    return policy


def to_samples(requests: Sequence[GenerateRequest], completions: Sequence[Completion]) -> list[TrainSample]:
    """The completions as training has them."""
    return [
        TrainSample(i, 0, "", 0.0, OBJECTIVE, (completion_segment(request.prompt_token_ids, completion),))
        for i, (request, completion) in enumerate(zip(requests, completions, strict=True))
    ]


@torch.no_grad()
def score(policy: PolicyModel, samples: Sequence[TrainSample], replay: str = BOTH) -> np.ndarray:
    """log pi_theta of every sampled token, float32 [N], in the order of the samples."""
    if policy.routing is not None:
        policy.routing.reset()
    samples = [with_replay(sample, replay) for sample in samples]
    (update,) = plan_updates(samples, max_tokens=MICROBATCH_TOKENS)
    parts: dict[int, np.ndarray] = {}
    for microbatch in update.ranks[0]:
        logprobs = token_logprobs(policy, pack(microbatch).to(device())).logprobs.float().cpu().numpy()
        ends = np.cumsum([sample.num_sampled for sample in microbatch.samples])
        parts |= dict(zip((s.group_index for s in microbatch.samples), np.split(logprobs, ends[:-1]), strict=True))
    reshard(policy)
    return np.concatenate([parts[sample.group_index] for sample in samples])


def score_with(change: Change, policy: PolicyModel, samples: Sequence[TrainSample]) -> np.ndarray:
    """`score` of a changed learner, which is as before afterwards."""
    with change(policy):
        return score(policy, samples)


def with_replay(sample: TrainSample, replay: str) -> TrainSample:
    """The sample with only some of its record."""
    (segment,) = sample.segments
    recorded: Replay = segment.replay
    kept = recorded.kept if "kept sets" in replay else None
    routes = recorded.routed_experts if "routes" in replay else None
    return replace(sample, segments=(replace(segment, replay=Replay(kept, routes)),))


def score_alone(policy: PolicyModel, samples: Sequence[TrainSample]) -> np.ndarray:
    """`score` through other, equally right kernels: a sequence per forward, sdpa, one matrix product per expert."""
    module: Any = policy.module
    experts = module.config._experts_implementation
    set_attention(module, "sdpa")
    module.set_experts_implementation("eager")
    other = replace(policy, attention="sdpa")
    with plain_experts(policy):
        logprobs = [score(other, [sample]) for sample in samples]
    set_attention(module, policy.attention)
    module.set_experts_implementation(experts)
    return np.concatenate(logprobs)


def agreement(policy: PolicyModel, replay: str) -> float:
    """Share of the last score's replayed slots that the learner's own routers would have chosen."""
    if policy.routing is None or "routes" not in replay:
        return float("nan")
    same, replayed = policy.routing.agreement().sum(0).tolist()
    return same / replayed


def common_difference(left: Sequence[Completion], right: Sequence[Completion]) -> np.ndarray:
    """Difference of the log-probs of tokens drawn alike, up to the first other token, where the kept sets are equal."""
    differences = []
    for a, b in zip(left, right, strict=True):
        length = min(a.num_tokens, b.num_tokens)
        same = np.cumprod(a.token_ids[:length] == b.token_ids[:length]).astype(bool)
        kept: list[Any] = [a.replay.kept, b.replay.kept]
        same &= [np.array_equal(*(sets.row(t) for sets in kept)) for t in range(length)]
        differences.append((a.behavior_logprobs[:length] - b.behavior_logprobs[:length])[same])
    return np.concatenate(differences)


def print_row(
    drawn: Draw, learner: str, scored: np.ndarray, samples: Sequence[TrainSample], agreed: float = float("nan")
) -> None:
    behavior = np.concatenate([s.segments[0].behavior_logprobs[s.segments[0].loss_mask] for s in samples])
    share = "" if np.isnan(agreed) else f"{agreed:.4f}"
    speed = "" if np.isnan(drawn.tokens_per_s) else f"{drawn.tokens_per_s:.0f}"
    print(f"| {drawn.label} | {learner} | {figures(scored - behavior)} | {share} | {speed} |", flush=True)


def figures(difference: np.ndarray) -> str:
    """Mean, 99th percentile and maximum of absolute values, as cells."""
    size = np.abs(difference)
    return f"{size.mean():.5f} | {np.percentile(size, 99):.4f} | {size.max():.4f}"


if __name__ == "__main__":
    main()
