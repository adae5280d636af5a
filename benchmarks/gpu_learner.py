"""The learner's step on one GPU against stock transformers on the same random batch: where time and memory go.

    python -m benchmarks.gpu_learner --shape moe-30b-6l
    python -m benchmarks.gpu_learner --shape dense-0.6b

Stock: the transformers model without output layer in bfloat16, sdpa, grouped_mm, gradient checkpointing, rows of equal
length, forward and backward only. Keel: `Learner` with routing replay, kept sets, float32 masters and AdamW; its
optimizer step is one of the rows. Floating-point operations are 6 x active parameters of the layers + attention per
token, recomputation not counted; the share is of a bfloat16 matrix product's rate in this run, and of 790 TFLOP/s.

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

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig

from benchmarks.gpu_models import model_config
from benchmarks.machine import describe_machine
from grpo.batch import TrainBatch
from grpo.config import LearnerConfig
from grpo.learner import Learner, LearnerSpec, LoadedModels
from grpo.logprobs import token_logprobs
from grpo.loss import LossInputs, grpo_loss
from grpo.model import prepare_policy, reshard

STATED_RATE = 790e12
"""FLOP/s of a dense bfloat16 product on an H200, which the targets are given in."""


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

    @property
    def tokens(self) -> int:
        """Packed tokens of a micro-batch."""
        return self.rows * self.length


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
    parser.add_argument("--profile", action="store_true", help="also list the kernels of one update")
    parser.add_argument("--skip-stock", action="store_true")
    arguments = parser.parse_args()
    work = WORKLOADS[arguments.shape]
    is_roomy = torch.cuda.get_device_properties("cuda").total_memory >= ROOMY_BYTES
    config = model_config(arguments.shape, **({} if is_roomy else work.changes))
    batches = [random_batch(config, work, seed).to(torch.device("cuda")) for seed in range(work.microbatches)]
    rate = matmul_rate()
    print(f"gpu       {torch.cuda.get_device_name()}, bfloat16 product of 8192: {rate / 1e12:.0f} TFLOP/s")
    print(describe_machine())
    flops = flops_per_token(config, work)
    print(f"{work.microbatches} micro-batches of {work.tokens} tokens, {flops / 1e9:.2f} GFLOP per token")
    print(f"vocabulary of {config.vocab_size}")
    print(f"\n{'':34}      ms  tokens/s  share  of 790 TF  KB kept per token  peak GB")

    def show(name: str, ms: float, tokens: int, kept: float) -> None:
        done = flops * tokens / ms * 1e3
        print(
            f"{name:34}{ms:8.1f}{tokens / ms * 1e3:10.0f}{done / rate:7.1%}{done / STATED_RATE:11.1%}"
            f"{kept / work.tokens / 1e3:19.0f}{torch.cuda.max_memory_allocated() / 1e9:9.2f}"
        )

    if not arguments.skip_stock:
        show("stock, forward + backward", *stock_step(config, batches[0], work))
        gc.collect()
        torch.cuda.empty_cache()
    measure_keel(config, batches, arguments, show)


def measure_keel(
    config: PretrainedConfig, batches: list[TrainBatch], arguments: argparse.Namespace, show: Callable[..., None]
) -> None:
    """Prints the learner's rows: one micro-batch forward and backward, a whole update, its stages, the kernels."""
    learner = random_learner(config, LearnerConfig(gradient_checkpointing=arguments.checkpointing))
    num_tokens = sum(len(batch.token_ids) for batch in batches)
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
    show("keel, forward + backward", forward + backward, num_tokens, kept)
    show("keel, Learner.train", ms, num_tokens, kept)
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
    """Milliseconds, tokens and bytes kept for backward of stock transformers on a micro-batch."""
    with torch.device("cuda"):
        model = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    token_ids = batch.token_ids.view(work.rows, work.length)

    def forward() -> Tensor:
        return model(input_ids=token_ids, use_cache=False).last_hidden_state.float().square().mean()

    def step() -> None:
        model.zero_grad(set_to_none=False)
        forward().backward()

    step()
    step()
    torch.cuda.reset_peak_memory_stats()
    ms = min(_timed(step) for _ in range(3))
    return ms, work.tokens, _kept_bytes(forward)


def _kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Memory held between a forward pass and its backward pass."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = forward()
    kept = torch.cuda.memory_allocated() - before
    del loss
    return kept


def random_batch(config: PretrainedConfig, work: Workload, seed: int) -> TrainBatch:
    """Random tokens, kept sets of 1 to 15 ids, routes of distinct experts, unknown at each sequence's last token."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    token_ids = integers(1, config.vocab_size, work.tokens)
    positions = torch.arange(work.length).repeat(work.rows)
    rows = (positions >= work.prompt).nonzero()[:, 0] - 1
    targets, num_sampled = token_ids[rows + 1], len(rows)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), integers(1, 16, num_sampled).cumsum(0)])
    kept_ids = integers(0, config.vocab_size, int(offsets[-1]))
    kept_ids[offsets[:-1]] = targets
    routes = None
    if hasattr(config, "num_experts"):
        scores = torch.rand(work.tokens, config.num_hidden_layers, config.num_experts, generator=generator)
        routes = scores.topk(config.num_experts_per_tok).indices.to(torch.int16)
        routes[work.length - 1 :: work.length] = -1
    ones = torch.ones(work.rows)
    return TrainBatch(
        token_ids=token_ids,
        position_ids=positions,
        cu_seqlens=torch.arange(0, work.tokens + 1, work.length, dtype=torch.int32),
        max_seqlen=work.length,
        routed_experts=routes,
        rows=rows,
        targets=targets,
        kept_offsets=offsets,
        kept_ids=kept_ids,
        untruncated=torch.zeros(num_sampled, dtype=torch.bool),
        temperature=torch.ones(num_sampled),
        behavior_logprobs=-2 * torch.rand(num_sampled, generator=generator),
        policy_versions=torch.zeros(num_sampled, dtype=torch.int32),
        sample_ids=torch.arange(work.rows).repeat_interleave(work.sampled),
        loss_weights=torch.full((num_sampled,), 1 / num_sampled),
        advantages=torch.randn(work.rows, generator=generator),
        beta=0 * ones,
        delta=ones * float("inf"),
        eps_low=0.2 * ones,
        eps_high=0.2 * ones,
        domains=("random",) * work.rows,
        unbiased_kl=True,
        needs_reference=False,
    )


def flops_per_token(config: PretrainedConfig, work: Workload) -> float:
    """6 x the layers' active parameters + causal attention forward and backward."""
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = 2 * width * heads + 2 * width * config.num_key_value_heads * config.head_dim
    if hasattr(config, "num_experts"):
        mlp = 3 * width * config.moe_intermediate_size * config.num_experts_per_tok + width * config.num_experts
    else:
        mlp = 3 * width * config.intermediate_size
    return config.num_hidden_layers * (6 * (attention + mlp) + 3 * 4 * heads * work.length / 2)


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
