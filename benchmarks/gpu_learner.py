"""The learner's step on one GPU against stock transformers on the same random batch: where time and memory go.

    python -m benchmarks.gpu_learner --shape moe-30b-6l
    python -m benchmarks.gpu_learner --shape dense-0.6b
    python -m benchmarks.gpu_learner --shape dense-0.6b --group 8

Stock: the transformers model without output layer in bfloat16, sdpa, grouped_mm, gradient checkpointing, rows of equal
length, forward and backward only. Keel: `Learner` with routing replay, kept sets, float32 masters and AdamW; its
optimizer step is one of the rows. Floating-point operations are 6 x active parameters of the layers + attention per
token, recomputation not counted; the share is of a bfloat16 matrix product's rate in this run, and of 790 TFLOP/s.

With `--group N` as many samples share their prompt, which Keel then computes once. Tokens/s count the samples' tokens,
operations those that were computed.

`moe-30b-6l` has its vocabulary of 151936 where the card holds at least 100 GB, and one of 16384 elsewhere: those 3.74 B
parameters in float32 with gradients, Adam's two moments and bfloat16 copies are 67 GB, and 80 GB must hold the
activations beside them.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig

from benchmarks.gpu_models import model_config
from benchmarks.machine import describe_machine
from grpo.advantage import Objective, Segment, TrainSample
from grpo.batch import MicroBatch, TrainBatch, pack
from grpo.config import LearnerConfig
from grpo.learner import Learner, LearnerSpec, LoadedModels
from grpo.logprobs import token_logprobs
from grpo.loss import LossInputs, grpo_loss
from grpo.policy.model import prepare_policy, reshard
from rollout.types import KeptSets, Replay

STATED_RATE = 790e12
"""FLOP/s of a dense bfloat16 product on an H200, which the targets are given in."""
OBJECTIVE = Objective(beta=0.0, delta=None, eps_low=0.2, eps_high=0.2, temperature=1.0)
ROOMY_BYTES = 100e9
"""Memory of a card from which on every shape keeps its true vocabulary."""


@dataclass(frozen=True)
class Workload:
    """A shape's batch: every micro-batch has `rows` sequences of `prompt` + `sampled` tokens.

    `changes` to the shape's configuration are made on cards of less than `ROOMY_BYTES` only.
    """

    rows: int
    prompt: int
    sampled: int
    microbatches: int
    changes: dict[str, Any]

    @property
    def length(self) -> int:
        return self.prompt + self.sampled


WORKLOADS = {
    "moe-30b-6l": Workload(4, 1024, 3072, 4, {"vocab_size": 16384}),
    "dense-0.6b": Workload(51, 128, 512, 5, {}),
}


def random_learner(config: PretrainedConfig, learner: LearnerConfig) -> Learner:
    """A learner whose model is random and never touches the disk."""
    with torch.device("cuda"):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    module.cpu()  # start-up checks of a learner run there
    gc.collect()
    torch.cuda.empty_cache()
    policy = prepare_policy(module, keep_routing=True, gradient_checkpointing=learner.gradient_checkpointing)
    spec = LearnerSpec("", learner, True, False, "bfloat16", total_updates=1000)
    return Learner(spec, loaded=LoadedModels(policy, None))


def main() -> None:
    """Parses the arguments, measures both and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(WORKLOADS), default="dense-0.6b")
    parser.add_argument("--checkpointing", action="store_true", help="recompute whole layers in the backward pass")
    parser.add_argument("--group", type=int, default=1, help="how many samples share a prompt")
    parser.add_argument("--profile", action="store_true", help="also list the kernels of one update")
    parser.add_argument("--skip-stock", action="store_true")
    arguments = parser.parse_args()
    work = WORKLOADS[arguments.shape]
    is_roomy = torch.cuda.get_device_properties("cuda").total_memory >= ROOMY_BYTES
    config = model_config(arguments.shape, **({} if is_roomy else work.changes))
    batches = [random_batch(config, work, arguments.group, seed) for seed in range(work.microbatches)]
    num_tokens, computed = batches[0].num_sample_tokens, len(batches[0].token_ids)
    batches = [batch.to(torch.device("cuda")) for batch in batches]
    rate = matmul_rate()
    print(f"gpu       {torch.cuda.get_device_name()}, bfloat16 product of 8192: {rate / 1e12:.0f} TFLOP/s")
    print(describe_machine())
    flops = flops_of(config, batches[0])
    print(f"{work.microbatches} micro-batches of {num_tokens} tokens, {computed} of them computed, for each of which")
    print(f"{flops / computed / 1e9:.2f} GFLOP")
    print(f"vocabulary of {config.vocab_size}")
    print(f"\n{'':34}      ms  tokens/s  share  of 790 TF  KB kept per token  peak GB")

    def show(name: str, ms: float, num_batches: int, kept: float, *, flops: float = flops) -> None:
        done = flops * num_batches / ms * 1e3
        print(
            f"{name:34}{ms:8.1f}{num_tokens * num_batches / ms * 1e3:10.0f}{done / rate:7.1%}{done / STATED_RATE:11.1%}"
            f"{kept / num_tokens / 1e3:19.0f}{torch.cuda.max_memory_allocated() / 1e9:9.2f}"
        )

    if not arguments.skip_stock:
        whole = random_batch(config, work, 1, 0)
        show("stock, forward + backward", *stock_step(config, whole, work), flops=flops_of(config, whole))
        gc.collect()
        torch.cuda.empty_cache()
    measure_keel(config, batches, arguments, show)


def measure_keel(
    config: PretrainedConfig, batches: list[TrainBatch], arguments: argparse.Namespace, show: Callable[..., None]
) -> None:
    """Prints the learner's rows: one micro-batch forward and backward, a whole update, its stages, the kernels."""
    learner = random_learner(config, LearnerConfig(gradient_checkpointing=arguments.checkpointing))
    learner.train([batches])
    learner.train([batches])
    stages: list[list[float]] = []
    for _ in range(4):
        stages.append(staged_update(learner, batches))
    forward, backward, rest = (min(column) for column in zip(*stages, strict=True))
    with torch.no_grad():
        token_logprobs(learner.policy, batches[0])  # now the compute copies are in memory, too
    kept = _kept_bytes(lambda: token_logprobs(learner.policy, batches[0]).logprobs)
    reshard(learner.policy)
    torch.cuda.reset_peak_memory_stats()
    ms = min(_timed(lambda: learner.train([batches])) for _ in range(3))
    show("keel, forward + backward", forward + backward, len(batches), kept)
    show("keel, Learner.train", ms, len(batches), kept)
    print(f"\nstages, ms: forward {forward:.1f}, backward {backward:.1f}, clip + AdamW {rest:.1f}")
    if arguments.profile:
        profile(lambda: learner.train([batches]))


def staged_update(learner: Learner, batches: list[TrainBatch]) -> list[float]:
    """Milliseconds of all forwards, all backwards, and clipping with the optimizer step, of one update."""
    marks: list[list[torch.cuda.Event]] = []

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    learner.optimizer.zero_grad(set_to_none=True)
    for batch in batches:
        start = mark()
        scored = token_logprobs(learner.policy, batch)
        output = grpo_loss(LossInputs(scored.logprobs, None, scored.entropy, batch))
        middle = mark()
        output.loss.backward()
        marks.append([start, middle, mark()])
    start = mark()
    learner.apply_gradients()
    end = mark()
    torch.cuda.synchronize()
    forward = sum(first.elapsed_time(second) for first, second, _ in marks)
    return [forward, sum(second.elapsed_time(third) for _, second, third in marks), start.elapsed_time(end)]


def stock_step(config: PretrainedConfig, batch: TrainBatch, work: Workload) -> tuple[float, int, float]:
    """Milliseconds, micro-batches and bytes kept for backward of stock transformers on one micro-batch."""
    with torch.device("cuda"):
        model = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    token_ids = batch.token_ids.view(work.rows, work.length).cuda()

    def forward() -> Tensor:
        return model(input_ids=token_ids, use_cache=False).last_hidden_state.float().square().mean()

    def step() -> None:
        model.zero_grad(set_to_none=False)
        forward().backward()

    step()
    step()
    torch.cuda.reset_peak_memory_stats()
    ms = min(_timed(step) for _ in range(3))
    return ms, 1, _kept_bytes(forward)


def _kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Memory held between a forward pass and its backward pass."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = forward()
    kept = torch.cuda.memory_allocated() - before
    del loss
    return kept


def random_batch(config: PretrainedConfig, work: Workload, group_size: int, seed: int) -> TrainBatch:
    """Packed samples of which every `group_size` have the prompt in common."""
    rng = np.random.default_rng(seed)
    samples: list[TrainSample] = []
    for i in range(work.rows):
        segment = random_segment(config, work, rng)
        if i % group_size:
            first = samples[-1].segments[0]
            segment.token_ids[: work.prompt] = first.token_ids[: work.prompt]
            ours, theirs = segment.replay.routed_experts, first.replay.routed_experts
            if ours is not None and theirs is not None:
                ours[: work.prompt] = theirs[: work.prompt]
        samples.append(TrainSample(i // group_size, i, "random", rng.standard_normal(), OBJECTIVE, (segment,)))
    weights = (1 / (work.rows * work.sampled),) * work.rows
    return pack(MicroBatch(tuple(samples), weights), share_prompts=group_size > 1)


def random_segment(config: PretrainedConfig, work: Workload, rng: np.random.Generator) -> Segment:
    """Random tokens, kept sets of 1 to 15 ids, routes of distinct experts."""
    token_ids = rng.integers(1, config.vocab_size, work.length).astype(np.int32)
    is_sampled = np.arange(work.length) >= work.prompt
    offsets = np.concatenate([[0], rng.integers(1, 16, work.sampled).cumsum()])
    kept_ids = rng.integers(0, config.vocab_size, offsets[-1]).astype(np.int32)
    kept_ids[offsets[:-1]] = token_ids[work.prompt :]
    routes = None
    if hasattr(config, "num_experts"):
        scores = torch.from_numpy(
            rng.random((work.length - 1, config.num_hidden_layers, config.num_experts), np.float32)
        )
        routes = scores.topk(config.num_experts_per_tok).indices.to(torch.uint8).numpy()
    return Segment(
        token_ids=token_ids,
        loss_mask=is_sampled,
        behavior_logprobs=np.where(is_sampled, -2 * rng.random(work.length), 0).astype(np.float32),
        policy_versions=np.where(is_sampled, 0, -1).astype(np.int32),
        replay=Replay(KeptSets(offsets, kept_ids), routes),
    )


def flops_of(config: PretrainedConfig, batch: TrainBatch) -> float:
    """6 x the layers' active parameters + causal attention forward and backward, of a micro-batch's computed tokens."""
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = 2 * width * heads + 2 * width * config.num_key_value_heads * config.head_dim
    if hasattr(config, "num_experts"):
        mlp = 3 * width * config.moe_intermediate_size * config.num_experts_per_tok + width * config.num_experts
    else:
        mlp = 3 * width * config.intermediate_size
    seen = int(batch.position_ids.sum())
    return config.num_hidden_layers * (6 * (attention + mlp) * len(batch.token_ids) + 3 * 4 * heads * seen)


def matmul_rate() -> float:
    """FLOP/s of a bfloat16 product of 8192 x 8192 random matrices."""
    left, right = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    _timed(lambda: left @ right)
    return 10 * 2 * 8192**3 / _timed(lambda: [left @ right for _ in range(10)]) * 1e3


def _timed(action: Callable[[], object]) -> float:
    """Milliseconds of one call and all it queues."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def profile(action: Callable[[], object]) -> None:
    """Lists the kernels that take the most time."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiled:
        ms = _timed(action)
    kernels = [e for e in profiled.key_averages() if e.device_type == torch.profiler.DeviceType.CUDA]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in kernels) / 1e3
    print(f"\n{ms:.1f} ms while profiled; kernels {busy:.1f} ms in {sum(e.count for e in kernels)} launches")
    for event in kernels[:40]:
        print(f"{event.self_device_time_total / 1e3:9.2f} ms {event.count:6d} x  {event.key[:100]}")


if __name__ == "__main__":
    main()
