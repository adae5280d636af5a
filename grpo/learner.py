"""One rank of the training group: packed batches in, new weights out.

Holds the policy (float32 master weights; FSDP2 when there are several ranks, half-precision copies when there is one),
its optimizer and the frozen reference. It does not know what an algorithm is (it is given a loss function), nor Ray,
nor where batches come from. Every public method but the constructor is a collective: all ranks call it with batches of
the same shape in number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from grpo.adamw import ScalingAdamW, learning_rate
from grpo.batch import TrainBatch
from grpo.checkpoint import export_model, load_training_state, save_training_state
from grpo.config import LearnerConfig
from grpo.logprobs import token_logprobs
from grpo.loss import LossFn, LossInputs, LossOutput, grpo_loss
from grpo.policy.model import PolicyModel, checkpoint_tensors, load_policy, reshard, shard_policy
from grpo.stats import Moments, StepStats
from rollout.weight_sync import WeightBucket, pack_buckets, pack_device_buckets


class LearnerError(RuntimeError):
    """Training cannot go on; the message says why and what to look at."""


@dataclass(frozen=True, slots=True)
class LearnerSpec:
    """Everything a rank needs to build itself."""

    model_path: str
    config: LearnerConfig
    keep_routing: bool
    needs_reference: bool
    engine_dtype: str
    """Weights are sent to the engines in this type."""
    total_updates: int
    """Optimizer steps of the whole run, for the schedule."""
    domains: tuple[str, ...] = ()
    """Names to report metrics by; empty = not by domain."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """One rank's part of a training step; losses are partial sums that add up over ranks."""

    stats: StepStats
    losses: tuple[float, ...]  # one per update
    grad_norms: tuple[float, ...]  # one per update, global, before clipping
    lr: float
    num_tokens: int
    """Packed: those that were computed."""
    num_sample_tokens: int
    """Of the samples, shared prompts counted for each of them."""
    peak_memory_bytes: int
    time_s: float


@dataclass(frozen=True, slots=True)
class LoadedModels:
    """What a learner starts from, still in host memory; it keeps and changes them."""

    policy: PolicyModel
    reference: PolicyModel | None


def load_models(spec: LearnerSpec) -> LoadedModels:
    """Reads the model and, if any KL strength is above zero, the reference, and checks them; uses no GPU.

    Raises:
        UnknownRouterError: a router that routing replay does not understand.
        ModelCheckError: packing, replay or the head do not do what they must on this model.
    """
    read = partial(load_policy, spec.model_path, gradient_checkpointing=spec.config.gradient_checkpointing)
    policy = read(keep_routing=spec.keep_routing, trainable=True)
    return LoadedModels(policy, read(keep_routing=False, trainable=False) if spec.needs_reference else None)


class _Updated(NamedTuple):
    """One rank's part of an update."""

    loss: float
    grad_norm: float
    num_tokens: int
    num_sample_tokens: int


class _Computed(NamedTuple):
    """A micro-batch whose forward and backward passes the GPU has been given."""

    batch: TrainBatch
    logprobs: Tensor
    output: LossOutput
    done: torch.cuda.Event | None


class Learner:
    """A training rank. The first policy version is 0; every `train` call makes the next one."""

    def __init__(
        self, spec: LearnerSpec, *, rank: int = 0, world_size: int = 1, loaded: LoadedModels | None = None
    ) -> None:
        """Takes over `loaded`, or loads them itself: raises what `load_models` raises.

        Raises:
            ModelCheckError: packed attention is wrong where it will run.
        """
        self.spec, self.rank, self.world_size = spec, rank, world_size
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        torch.manual_seed(spec.seed)
        loaded = loaded or load_models(spec)
        self.policy, self.reference = loaded.policy, loaded.reference
        self.shares_prompts = self.policy.shares_prompts
        config = spec.config
        for model in (self.policy, self.reference):
            if model is not None:
                shard_policy(model, compute_dtype=getattr(torch, config.dtype), world_size=world_size)
        self.optimizer = ScalingAdamW([p for p in self.policy.module.parameters() if p.requires_grad], config)
        self.policy_version = 0
        self.num_updates = 0
        if self.device.type == "cuda":
            self._copying = torch.cuda.Stream()

    def train(self, updates: Sequence[Sequence[TrainBatch]], loss_fn: LossFn = grpo_loss) -> StepResult:
        """One optimizer step per entry of `updates`, each over that entry's micro-batches, which are asked for once and
        in order.

        Raises:
            LearnerError: a gradient norm is not finite; no weight has been touched by that update.
        """
        started, stats = time.perf_counter(), StepStats()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if self.policy.routing is not None:
            self.policy.routing.reset()
        done: list[_Updated] = []
        for index, microbatches in enumerate(updates):
            done.append(self._update(microbatches, loss_fn, stats, is_fresh=index == 0))
            if index == 0:
                self._record_agreement(stats)
        self.policy_version += 1
        return StepResult(
            stats=stats,
            losses=tuple(update.loss for update in done),
            grad_norms=tuple(update.grad_norm for update in done),
            lr=self.optimizer.param_groups[0]["lr"],
            num_tokens=sum(update.num_tokens for update in done),
            num_sample_tokens=sum(update.num_sample_tokens for update in done),
            peak_memory_bytes=_peak_memory(self.device),
            time_s=time.perf_counter() - started,
        )

    def score(self, batches: Sequence[TrainBatch]) -> np.ndarray:
        """log pi_theta of every sampled token under replay, float32 [N over all batches]; no gradient, no state
        change."""
        with torch.no_grad():
            scores = [token_logprobs(self.policy, batch.to(self.device)).logprobs for batch in batches]
        reshard(self.policy)
        return torch.cat(scores).float().cpu().numpy()

    def weight_buckets(self, max_bytes: int, *, sends: bool = True, on_device: bool = False) -> Iterator[WeightBucket]:
        """The policy's weights under checkpoint names in the engines' dtype, layer by layer.

        A rank that `sends` yields all of them, the others take part and yield none. `on_device` keeps the bytes on the
        GPU, for an engine on the same one; what no engine opens stays in its memory.
        """
        tensors = self._gathered_weights()
        if sends:
            pack = pack_device_buckets if on_device else pack_buckets
            yield from pack(tensors, max_bytes=max_bytes)
        for _ in tensors:  # the other ranks take part in gathering
            pass

    def save(self, folder: Path) -> None:
        """Writes weights, optimizer, counters and random state; see `grpo.checkpoint` for what makes a checkpoint
        complete."""
        save_training_state(folder, self.policy.module, self.optimizer, self._counters())

    def load(self, folder: Path) -> None:
        """Continues from `save`: bit-equal on CPU with the same number of ranks."""
        counters = load_training_state(folder, self.policy.module, self.optimizer)
        self.policy_version, self.num_updates = counters["policy_version"], counters["num_updates"]

    def export(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face model folder in the engines' dtype, with the base model's tokenizer."""
        tensors = self._gathered_weights()
        if self.rank == 0:
            export_model(folder, tensors, self.policy.module, self.spec.model_path)
        for _ in tensors:  # the other ranks take part in gathering
            pass

    def _gathered_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint tensors in the engines' type; a collective that every rank must run to its end."""
        return checkpoint_tensors(self.policy, getattr(torch, self.spec.engine_dtype))

    def _counters(self) -> dict[str, int]:
        return {"policy_version": self.policy_version, "num_updates": self.num_updates}

    def _update(
        self, microbatches: Sequence[TrainBatch], loss_fn: LossFn, stats: StepStats, *, is_fresh: bool
    ) -> _Updated:
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        behind: _Computed | None = None
        num_tokens = num_sample_tokens = 0
        for index, packed in enumerate(microbatches):
            num_tokens += len(packed.token_ids)
            num_sample_tokens += packed.num_sample_tokens
            batch = self._to_device(packed)
            self._sync_gradients(index == len(microbatches) - 1)
            scored = token_logprobs(self.policy, batch)
            output = loss_fn(LossInputs(scored.logprobs, self._reference_logprobs(batch), scored.entropy, batch))
            # FSDP averages gradients over ranks; the weights are those of a sum over the whole update.
            (output.loss * self.world_size).backward()
            total += output.loss.detach()
            output = replace(output, loss=output.loss.detach())
            computed = _Computed(batch, scored.logprobs.detach(), output, self._so_far())
            if behind is not None:  # while the GPU works on this one
                self._record_beside(stats, behind, is_fresh)
            behind = computed
        norm = self.apply_gradients()
        if behind is not None:
            self._record_beside(stats, behind, is_fresh)
        return _Updated(total.item(), norm, num_tokens, num_sample_tokens)

    def _to_device(self, batch: TrainBatch) -> TrainBatch:
        """Copies beside what the GPU computes: in a stream of its own, a copy from pageable memory waits for nothing
        else. The batch must live until the GPU is done with it."""
        if self.device.type != "cuda":
            return batch.to(self.device)
        computing = torch.cuda.current_stream()
        with torch.cuda.stream(self._copying):
            moved = batch.to(self.device)
        computing.wait_stream(self._copying)
        return moved

    def _so_far(self) -> torch.cuda.Event | None:
        """Done when the GPU has done what it has been given until now; None without a GPU."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _record_beside(self, stats: StepStats, computed: _Computed, is_fresh: bool) -> None:
        """Waits for this micro-batch only, not for what the GPU was given after it."""
        if computed.done is None:
            self._record(stats, computed.batch, computed.logprobs, computed.output, is_fresh)
            return
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(computed.done)
            self._record(stats, computed.batch, computed.logprobs, computed.output, is_fresh)
        self._copying.synchronize()

    def apply_gradients(self) -> float:
        """Clips the gradients, takes an optimizer step with them, and returns their norm before clipping.

        Raises:
            LearnerError: the norm is not finite; no weight has been touched.
        """
        reshard(self.policy)
        gradients = [p.grad for p in self.policy.module.parameters() if p.grad is not None]
        norm = _full(torch.nn.utils.get_total_norm(gradients)).item()
        if not np.isfinite(norm):
            raise LearnerError(
                f"gradient norm is {norm} at optimizer step {self.num_updates}: look at mismatch and ratio_max in "
                "metrics.jsonl, and rerun with debug.dump_batches = true to replay the batch"
            )
        self._set_lr()
        self.optimizer.step_scaled(min(1.0, self.spec.config.max_grad_norm / (norm + 1e-6)))
        self.num_updates += 1
        return norm

    def _reference_logprobs(self, batch: TrainBatch) -> Tensor | None:
        """log pi_ref over the same supports; the reference routes by itself.

        Computed for every batch of a run that has a reference, whatever its betas: the forward is a collective.
        """
        if self.reference is None:
            return None
        with torch.no_grad():
            return token_logprobs(self.reference, replace(batch, routed_experts=None)).logprobs

    def _sync_gradients(self, sync: bool) -> None:
        """Reduces gradients over ranks only with the last micro-batch of an update."""
        if isinstance(self.policy.module, FSDPModule):
            self.policy.module.set_requires_gradient_sync(sync)

    def _set_lr(self) -> None:
        lr = learning_rate(self.spec.config, self.num_updates, self.spec.total_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _record_agreement(self, stats: StepStats) -> None:
        """The share of replayed expert slots that the learner's own router would have chosen, before the step's first
        update."""
        if self.policy.routing is not None:
            same, replayed = (int(n) for n in self.policy.routing.agreement().sum(0))
            if replayed:
                stats.moments["route_agreement"] = Moments(replayed, float(same), 1.0)

    def _record(
        self, stats: StepStats, batch: TrainBatch, logprobs: Tensor, output: LossOutput, is_fresh: bool
    ) -> None:
        """Takes a micro-batch's values into the step's sums; a no-op batch (all weights zero) leaves no trace."""
        if not (batch.loss_weights > 0).any():
            return
        domain_of = np.array(batch.domains)
        by_token = domain_of[batch.sample_ids.cpu().numpy()]
        for name, values in output.token_stats.items():
            stats.add_by_domain(name, _array(values), by_token, self.spec.domains)
        for name, values in output.sample_stats.items():
            stats.add_by_domain(name, _array(values), domain_of, self.spec.domains)
        staleness = self.policy_version - _array(batch.policy_versions)
        stats.add("staleness", staleness)
        stats.add("kept_size", np.diff(_array(batch.kept_offsets))[~_array(batch.untruncated)])
        if is_fresh:
            difference = np.abs(_array(logprobs) - _array(batch.behavior_logprobs))
            stats.add_mismatch(difference[_is_fresh_sample(staleness, batch)])


def _is_fresh_sample(staleness: np.ndarray, batch: TrainBatch) -> np.ndarray:
    """Tokens of samples drawn by the current weights from their first token to their last: bool [N].

    In a sample that lived through a weight update the engine computed the earlier context again under the new
    weights, along
    new routes, while the record keeps for each token the routes it was drawn with; its difference is staleness, not
    mismatch.
    """
    oldest = np.zeros(len(batch.domains), staleness.dtype)
    sample_ids = _array(batch.sample_ids)
    np.maximum.at(oldest, sample_ids, staleness)
    return (oldest == 0)[sample_ids]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _full(tensor: Tensor) -> Tensor:
    """A DTensor's whole value; a plain tensor as it is."""
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: of the allocator on a GPU, resident set of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
