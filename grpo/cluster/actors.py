"""The plain worker and learner behind Ray, and the split of light completions from heavy records.

Records never pass through the driver: a rollout actor returns light completions and, as a second object, their `Replay`
records; the driver passes the reference on and the learner rank that trains on them fetches it. Both objects belong to
the driver, so they outlive the worker that made them.
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from grpo.advantage import Segment, TrainSample
from grpo.batch import MicroBatch, pack
from grpo.learner import Learner, LearnerSpec, LoadedModels, StepResult, load_models
from grpo.replay import dump_step
from rollout.types import Completion, GenerateRequest, Replay
from rollout.weight_sync import WeightBucket
from rollout.worker import RolloutWorker

_BUCKET_BYTES = 256 << 20
"""Weights in flight at a time: the sync needs a few of these in host memory, whatever the model's size."""


@dataclass(frozen=True, slots=True)
class ReplayRef:
    """A handle to one `Replay` inside a request's record object."""

    ref: Any  # ray.ObjectRef of tuple[Replay, ...]
    index: int


class RolloutActor:
    """A rollout worker behind Ray."""

    def __init__(self, worker_class: type[RolloutWorker], kwargs: dict[str, Any]) -> None:
        gc.freeze()  # the modules; starting vLLM would have them searched for garbage again and again
        self._worker = worker_class(**kwargs)
        _keep_for_good()

    async def pid(self) -> int:
        return os.getpid()

    @ray.method(num_returns=2)
    async def generate(self, request: GenerateRequest) -> tuple[tuple[Completion, ...], tuple[Replay, ...]]:
        completions = await self._worker.generate(request)
        num_prompt = len(request.prompt_token_ids)
        light = tuple(replace(c, replay=None, record_error=c.find_record_error(num_prompt)) for c in completions)
        return light, tuple(c.replay for c in completions)

    async def sleep(self) -> None:
        await self._worker.sleep()

    async def begin_weight_update(self) -> None:
        await self._worker.begin_weight_update()

    async def load_weights(self, bucket: WeightBucket) -> None:
        await self._worker.load_weights(bucket)

    async def finish_weight_update(self, policy_version: int) -> None:
        await self._worker.finish_weight_update(policy_version)


class LearnerActor:
    """A learner rank behind Ray."""

    _loaded: LoadedModels
    _learner: Learner

    def free_address(self) -> str:
        """Where the ranks of the group can meet: an address of this node with a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def read_model(self, spec: LearnerSpec, world_size: int) -> None:
        if torch.cuda.is_available():  # the CPU only loads and checks the model
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
        else:
            torch.set_num_threads(spec.config.cpu_threads)
        self._loaded = load_models(spec)

    def build(self, spec: LearnerSpec, rank: int, world_size: int, address: str) -> None:
        if world_size > 1:
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(
                backend, init_method=f"tcp://{address}", rank=rank, world_size=world_size
            )
        self._learner = Learner(spec, rank=rank, world_size=world_size, loaded=self._loaded)
        del self._loaded
        _keep_for_good()

    def train(self, updates: Sequence[Sequence[MicroBatch]], dump_to: Path | None) -> StepResult:
        batches = [[pack(microbatch) for microbatch in fetch_records(microbatches)] for microbatches in updates]
        if dump_to is None:
            return self._learner.train(batches)
        return dump_step(self._learner, batches, dump_to)

    def score(self, samples: Sequence[TrainSample]) -> np.ndarray:
        (microbatch,) = fetch_records([MicroBatch(tuple(samples), (0.0,) * len(samples))])
        return self._learner.score([pack(microbatch)])

    def release_cached_memory(self) -> None:
        """Gives what the last step's activations took back to the GPU, for an engine that wakes up on it."""
        torch.cuda.empty_cache()

    def weight_bytes(self) -> int:
        """Bytes of the parameters as a weight sync sends them."""
        itemsize = getattr(torch, self._learner.spec.engine_dtype).itemsize
        return sum(p.numel() for p in self._learner.policy.module.parameters()) * itemsize

    def policy_version(self) -> int:
        return self._learner.policy_version

    def weight_buckets(self, on_device: bool) -> Iterator[WeightBucket]:
        yield from self._learner.weight_buckets(_BUCKET_BYTES, on_device=on_device)

    def save(self, folder: Path) -> None:
        self._learner.save(folder)

    def load(self, folder: Path) -> None:
        self._learner.load(folder)

    def export(self, folder: Path) -> None:
        self._learner.export(folder)


def _keep_for_good() -> None:
    """Takes what is alive now, and will be to the end of the process, out of all later searches for garbage: each of
    them would hold up a step by some tenths of a second."""
    gc.collect()
    gc.freeze()


def fetch_records(microbatches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The same micro-batches with every replay handle replaced by its record; one fetch for all."""
    segments = [segment for m in microbatches for sample in m.samples for segment in sample.segments]
    handles: list[Any] = [segment.replay for segment in segments]
    refs = list(dict.fromkeys(handle.ref for handle in handles))
    records: dict[Any, tuple[Replay, ...]] = dict(zip(refs, ray.get(refs), strict=True))

    def fetched(sample: TrainSample) -> TrainSample:
        return replace(sample, segments=tuple(with_record(segment, segment.replay) for segment in sample.segments))

    def with_record(segment: Segment, handle: Any) -> Segment:
        return replace(segment, replay=records[handle.ref][handle.index])

    return [MicroBatch(tuple(fetched(sample) for sample in m.samples), m.token_weights) for m in microbatches]
