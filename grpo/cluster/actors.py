"""The plain worker and learner behind Ray, and the split of light completions from heavy records.

Records never pass through the driver: a rollout actor returns light completions and, as a second object, their `Replay`
records; the driver passes the reference on and the learner rank that trains on them fetches it. Both objects belong to
the driver, so they outlive the worker that made them. What is sent is put into parcels (`parcels.py`).
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import traceback
from collections.abc import Awaitable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import torch

from grpo.batch import TrainBatch, pack
from grpo.cluster.parcels import CompletionParcel, MicroBatchParcel, RecordParcel, ReplayRef
from grpo.learner import Learner, LearnerSpec, LoadedModels, StepResult, load_models
from grpo.policy.outline import from_outline, take_outline
from grpo.replay import dump_step
from rollout.engine import EngineDiedError
from rollout.types import GenerateRequest, Replay
from rollout.weight_sync import WeightBucket
from rollout.worker import RolloutWorker

_T = TypeVar("_T")

_BUCKET_BYTES = 256 << 20
"""Weights in flight at a time: the sync needs a few of these in host memory, whatever the model's size."""


class RolloutActor:
    """A rollout worker behind Ray."""

    def __init__(self, worker_class: type[RolloutWorker], kwargs: dict[str, Any]) -> None:
        gc.freeze()  # the modules; starting vLLM would have them searched for garbage again and again
        self._worker = worker_class(**kwargs)
        keep_for_good()

    async def pid(self) -> int:
        return os.getpid()

    @ray.method(num_returns=2)
    async def generate(self, request: GenerateRequest) -> tuple[CompletionParcel, RecordParcel]:
        completions = await _or_end(self._worker.generate(request))
        light = CompletionParcel.of(completions, len(request.prompt_token_ids))
        return light, RecordParcel.of([completion.replay for completion in completions])

    async def sleep(self) -> None:
        await _or_end(self._worker.sleep())

    async def begin_weight_update(self) -> None:
        await _or_end(self._worker.begin_weight_update())

    async def load_weights(self, bucket: WeightBucket) -> None:
        await _or_end(self._worker.load_weights(bucket))

    async def finish_weight_update(self, policy_version: int) -> None:
        await _or_end(self._worker.finish_weight_update(policy_version))


async def _or_end(call: Awaitable[_T]) -> _T:
    """What an engine answers. One that has died takes its process along, which alone gives back all it held, and the
    pool finds its worker dead; the error is left in the process's log."""
    try:
        return await call
    except EngineDiedError as error:
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(1)


class LearnerActor:
    """A learner rank behind Ray."""

    _loaded: LoadedModels
    _learner: Learner

    def free_address(self) -> str:
        """Where the ranks of the group can meet: an address of this node with a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def read_model(self, spec: LearnerSpec) -> None:
        """How rank 0 begins: alone, so with all cores of its node."""
        _use_cores(spec)
        self._loaded = load_models(spec)

    def outline(self) -> bytes:
        """What the other ranks begin with, to be asked for between `read_model` and `build`."""
        return take_outline(self._loaded)

    def take_model(self, outline: bytes) -> None:
        """How every other rank begins; the weights come with `build`."""
        self._loaded = from_outline(outline)

    def build(self, spec: LearnerSpec, rank: int, world_size: int, address: str) -> None:
        _use_cores(spec, among=world_size)
        if world_size > 1:
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(
                backend, init_method=f"tcp://{address}", rank=rank, world_size=world_size
            )
        self._learner = Learner(spec, rank=rank, world_size=world_size, loaded=self._loaded)
        del self._loaded
        keep_for_good()

    def train(self, updates: Sequence[Sequence[MicroBatchParcel]], dump_to: Path | None) -> StepResult:
        batches = [PackedWhenAsked(parcels, self._learner.shares_prompts) for parcels in updates]
        if dump_to is None:
            return self._learner.train(batches)
        return dump_step(self._learner, [list(update) for update in batches], dump_to)

    def score(self, parcel: MicroBatchParcel) -> np.ndarray:
        return self._learner.score(PackedWhenAsked([parcel], self._learner.shares_prompts))

    def release_cached_memory(self) -> None:
        """Gives what the last step's activations took back to the GPU, for an engine that wakes up on it."""
        torch.cuda.empty_cache()

    def weight_bytes(self) -> int:
        """Bytes of the parameters as a weight sync sends them."""
        itemsize = getattr(torch, self._learner.spec.engine_dtype).itemsize
        return sum(p.numel() for p in self._learner.policy.module.parameters()) * itemsize

    def policy_version(self) -> int:
        return self._learner.policy_version

    def shares_prompts(self) -> bool:
        return self._learner.shares_prompts

    def weight_buckets(self, sends: bool, on_device: bool) -> Iterator[WeightBucket]:
        yield from self._learner.weight_buckets(_BUCKET_BYTES, sends=sends, on_device=on_device)

    def save(self, folder: Path) -> None:
        self._learner.save(folder)

    def load(self, folder: Path) -> None:
        self._learner.load(folder)

    def export(self, folder: Path) -> None:
        self._learner.export(folder)


def _use_cores(spec: LearnerSpec, *, among: int = 1) -> None:
    if torch.cuda.is_available():  # the CPU only loads and checks the model
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // among))
    else:
        torch.set_num_threads(spec.config.cpu_threads)


def keep_for_good() -> None:
    """Takes what is alive now, and will be to the end of the process, out of all later searches for garbage: each of
    them would hold up a step by some tenths of a second."""
    gc.collect()
    gc.freeze()


class PackedWhenAsked(Sequence[TrainBatch]):
    """An update's micro-batches, their records fetched together; each is packed when it is asked for, so that the GPU
    works on one while the next is packed."""

    def __init__(self, parcels: Sequence[MicroBatchParcel], share_prompts: bool) -> None:
        self._parcels, self._share_prompts = parcels, share_prompts
        refs = list(dict.fromkeys(ref for parcel in parcels for ref in parcel.record_refs))
        parcels_of_records: list[RecordParcel] = ray.get(refs)
        self._records = {ref: records.open() for ref, records in zip(refs, parcels_of_records, strict=True)}

    def __len__(self) -> int:
        return len(self._parcels)

    def __getitem__(self, index: int) -> TrainBatch:
        return pack(self._parcels[index].open(self._find_record), share_prompts=self._share_prompts)

    def _find_record(self, handle: ReplayRef) -> Replay:
        return self._records[handle.ref][handle.index]
