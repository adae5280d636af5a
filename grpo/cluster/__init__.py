"""Everything Ray. `Cluster` is the driver's view of the run's actors; the loop never sees an actor or a reference.

- `actors`: the plain classes behind Ray, records kept apart from completions
- `parcels`: what is sent, in few arrays
- `placement`: resources, all or nothing
- `workers`: the rollout pool, replacement of dead workers
- `rewards`: the reward pool
- `waits`: names and limits for every wait
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from grpo.batch import MicroBatch, Update
from grpo.cluster.actors import LearnerActor, keep_for_good
from grpo.cluster.parcels import MicroBatchParcel
from grpo.cluster.placement import claim_resources, start_ray
from grpo.cluster.rewards import RemoteRewardWorker
from grpo.cluster.waits import ClusterError, wait_for
from grpo.cluster.workers import RolloutPool, Slot
from grpo.config import TrainConfig
from grpo.learner import LearnerSpec, StepResult
from grpo.parity import ParityProbe
from rewards.load import RewardSpec
from rewards.outcome import Outcome
from rewards.pool import RewardPool
from rewards.types import Answer
from rollout.types import Completion, GenerateRequest, Task
from rollout.worker import RolloutWorker

__all__ = ["Cluster", "ClusterError", "SyncResult"]


@dataclass(frozen=True, slots=True)
class SyncResult:
    """What a weight sync did."""

    policy_version: int
    parity_error: float
    """Worst mean |log pi_learner - log pi_engine| of the probe over the engines, in nats."""
    num_bytes: int
    """Size of the weights that each engine received."""
    sync_s: float
    probe_s: float
    resumed_at: float
    """When the engines went on, on `time.perf_counter`."""


class Cluster:
    """The rollout workers, the reward workers and the learner group of one run."""

    def __init__(
        self,
        config: TrainConfig,
        spec: LearnerSpec,
        probe: ParityProbe,
        *,
        worker_class: type[RolloutWorker] = RolloutWorker,
    ) -> None:
        self._config, self._limits, self._spec, self._probe = config, config.cluster, spec, probe
        self._rewards: Sequence[RewardSpec] = ()
        self._reward_workers: list[RemoteRewardWorker] = []
        self._reward_start: asyncio.Task[RewardPool] | None = None
        self._worker_class = worker_class
        self._sync_lock = asyncio.Lock()

    async def start(self) -> None:
        """Claims resources and brings up every actor.

        Raises:
            ClusterError: resources or an actor did not come in time; says which, and what the cluster has.
        """
        start_ray(self._config)
        self._placement = await claim_resources(self._config)
        if self._rewards:
            self._starting_rewards()  # beside the engines; the first score waits for it
        config = self._config
        worker_kwargs = {
            "model_path": self._spec.model_path,
            "config": config.rollout,
            "max_model_len": config.longest_sequence,
            "record_kept": config.stability.keep_sampling_mask and config.truncates,
            "record_routing": self._spec.keep_routing,
            "seed": config.run.seed,
        }
        self.pool = RolloutPool(
            self._placement,
            self._limits,
            worker_class=self._worker_class,
            worker_kwargs=worker_kwargs,
            refresh=self._refresh,
        )
        world = config.learner.ranks
        self._ranks = [ray.remote(LearnerActor).options(**self._placement.rank(i)).remote() for i in range(world)]
        first, *others = self._ranks
        reads = [first.read_model.remote(self._spec)]
        if others:
            outline = first.outline.remote()
            reads += [rank.take_model.remote(outline) for rank in others]
        await asyncio.gather(self.pool.wait_until_up(), *self._starts(reads, "load the model"))
        # Only now: vLLM sizes its cache by the GPU memory that is free while it starts, and stops if it grows.
        address = await self._wait_rank(0, first.free_address.remote(), "answer", "start_timeout_s")
        builds = [rank.build.remote(self._spec, i, world, address) for i, rank in enumerate(self._ranks)]
        await asyncio.gather(*self._starts(builds, "take up the model"))
        self._weight_bytes = await self._wait_rank(0, first.weight_bytes.remote(), "answer", "start_timeout_s")
        self.shares_prompts: bool = await self._wait_rank(0, first.shares_prompts.remote(), "answer", "start_timeout_s")
        keep_for_good()

    def shutdown(self) -> None:
        """Ends every actor and leaves Ray."""
        for worker in self._reward_workers:
            worker.kill()
        if hasattr(self, "pool"):
            self.pool.close()
        for rank in getattr(self, "_ranks", ()):
            ray.kill(rank)
        if hasattr(self, "_placement"):
            self._placement.release()
        ray.shutdown()
        gc.unfreeze()

    async def generate(self, request: GenerateRequest, what: str) -> tuple[Completion, ...]:
        """Draws a request on some worker; `what` names it in errors."""
        return await self.pool.generate(request, what)

    def use_rewards(self, rewards: Sequence[RewardSpec]) -> None:
        """Names everything that `run_reward` will be asked for."""
        self._rewards = rewards

    async def run_reward(self, spec: RewardSpec, task: Task, answers: Sequence[Answer]) -> Sequence[Outcome]:
        """Calls a reward function on some reward worker; one outcome per answer. Starts the workers if nothing has."""
        pool = await asyncio.shield(self._starting_rewards())
        return await pool.run_reward(spec, task, answers)

    def _starting_rewards(self) -> asyncio.Task[RewardPool]:
        if self._reward_start is None:
            self._reward_start = asyncio.create_task(self._start_rewards(), name="start the reward workers")
        return self._reward_start

    async def _start_rewards(self) -> RewardPool:
        limits = self._limits
        self._reward_workers = [RemoteRewardWorker(i, self._rewards, limits) for i in range(limits.reward_workers)]
        pool = RewardPool(self._reward_workers)
        await pool.start()
        return pool

    async def train(self, updates: Sequence[Update], dump_to: Path | None = None) -> list[StepResult]:
        """One training step on all ranks; results in rank order. Engines that sleep meanwhile wake in the next sync."""
        if self._config.rollout.sleep_while_training:
            await self.pool.on_each(self.pool.ready_slots, lambda slot: slot.actor.sleep.remote(), "fall asleep")
        parts = [[[MicroBatchParcel.of(m) for m in u.ranks[i]] for u in updates] for i in range(len(self._ranks))]
        calls = [rank.train.remote(part, dump_to) for rank, part in zip(self._ranks, parts, strict=True)]
        return await self._wait_ranks(calls, "train on the step's batch")

    async def sync_weights(self, while_held: Callable[[], None] = lambda: None) -> SyncResult:
        """Streams the learner's weights into every worker, then probes each.

        `while_held` is called when the engines stand still: what it asks them for waits there for the new weights, so
        that it starts at once and together when they go on, beside the probe.

        Raises:
            ParityError: an engine does not answer as the learner does.
        """
        async with self._sync_lock:
            return await self._sync(self.pool.ready_slots, while_held)

    async def save(self, folder: Path) -> None:
        """Every rank writes its share of the training state."""
        await self._wait_ranks([rank.save.remote(folder) for rank in self._ranks], "save a checkpoint")

    async def load(self, folder: Path) -> None:
        """Every rank reads its share back."""
        await self._wait_ranks([rank.load.remote(folder) for rank in self._ranks], "load a checkpoint")

    async def export(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face model folder."""
        await self._wait_ranks([rank.export.remote(folder) for rank in self._ranks], "export the model")

    async def _refresh(self, slot: Slot) -> None:
        async with self._sync_lock:
            await self._sync([slot], lambda: None)

    async def _sync(self, slots: Sequence[Slot], while_held: Callable[[], None]) -> SyncResult:
        started = time.perf_counter()
        pool = self.pool
        version = await self._wait_rank(0, self._ranks[0].policy_version.remote(), "answer", "train_timeout_s")
        if self._config.rollout.sleep_while_training:
            calls = [rank.release_cached_memory.remote() for rank in self._ranks]
            await self._wait_ranks(calls, "release memory")
        senders = sorted({self._sender_to(slot) for slot in slots})
        streams = self._start_weight_streams(senders)  # the first bucket is packed while the engines come to rest
        alive = await pool.on_each(slots, lambda slot: slot.actor.begin_weight_update.remote(), "pause for new weights")
        while_held()
        async for refs in self._weight_buckets(streams, senders):
            alive = await pool.on_each(
                alive,
                lambda slot, refs=refs: slot.actor.load_weights.remote(refs[self._sender_to(slot)]),
                "load new weights",
            )
        # Asked for while the engines are held, the probe's samples are the first that they draw when they go on.
        drawing = [[pool.generate_on(slot, r, "the parity probe") for r in self._probe.requests] for slot in alive]
        await pool.on_each(alive, lambda slot: slot.actor.finish_weight_update.remote(version), "finish a weight sync")
        synced = time.perf_counter()
        errors = await self._find_parity_errors(alive, version, drawing)
        return SyncResult(
            version,
            parity_error=max(errors, default=0.0),
            num_bytes=self._weight_bytes,
            sync_s=synced - started,
            probe_s=time.perf_counter() - synced,
            resumed_at=synced,
        )

    def _sender_to(self, slot: Slot) -> int:
        """The rank that a worker gets its weights from: the one on its GPU, or rank 0."""
        return slot.number if self._placement.shared else 0

    def _start_weight_streams(self, senders: Sequence[int]) -> list[Any]:
        """Starts gathering on every rank and packing on these; a few buckets run ahead of what is read."""
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": 2}
        return [
            rank.weight_buckets.options(**options).remote(sends=i in senders, on_device=self._placement.shared)
            for i, rank in enumerate(self._ranks)
        ]

    async def _weight_buckets(self, streams: Sequence[Any], senders: Sequence[int]) -> AsyncIterator[dict[int, Any]]:
        """One bucket after another, as references by the rank that has packed it; all pack the same ones."""
        what = ("send its weights", "sync_timeout_s")
        while senders:  # none, where every worker is being replaced
            refs = {i: await self._wait_rank(i, anext(streams[i], None), *what) for i in senders}
            if None in refs.values():
                break
            yield refs
        await asyncio.gather(*(self._wait_rank(i, s.completed(), *what) for i, s in enumerate(streams)))

    async def _find_parity_errors(
        self, slots: Sequence[Slot], version: int, drawing: Sequence[Sequence[Awaitable[tuple[Completion, ...]]]]
    ) -> list[float]:
        """The probe's error of every engine that lives to answer it; as many engines at a time as there are ranks."""
        answers = await asyncio.gather(*(asyncio.gather(*calls) for calls in drawing), return_exceptions=True)
        drawn: list[tuple[Slot, Sequence[tuple[Completion, ...]]]] = []
        for slot, answer in zip(slots, answers, strict=True):
            if isinstance(answer, RayActorError):
                self.pool.replace(slot)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                drawn.append((slot, answer))
        errors = []
        for start in range(0, len(drawn), len(self._ranks)):
            part = drawn[start : start + len(self._ranks)]
            for (slot, answer), scores in zip(part, await self._score([answer for _, answer in part]), strict=True):
                engine_logprobs = np.concatenate([c.behavior_logprobs for completions in answer for c in completions])
                errors.append(self._probe.check(slot.name, version, engine_logprobs, scores))
        return errors

    async def _score(self, answers: Sequence[Sequence[tuple[Completion, ...]]]) -> list[np.ndarray]:
        """The learner's log-probabilities of each engine's answer to the probe, one on each rank. Ranks without one
        score the first again: they all take part in every forward."""
        samples = [tuple(self._probe.to_samples(answer)) for answer in answers]
        parcels = [MicroBatchParcel.of(MicroBatch(s, (0.0,) * len(s))) for s in samples]
        parcels += parcels[:1] * (len(self._ranks) - len(parcels))
        calls = [rank.score.remote(parcel) for rank, parcel in zip(self._ranks, parcels, strict=True)]
        return (await self._wait_ranks(calls, "score the parity probe"))[: len(answers)]

    async def _wait_ranks(self, calls: Sequence[Any], what: str) -> list[Any]:
        waits = [self._wait_rank(i, call, what, "train_timeout_s") for i, call in enumerate(calls)]
        return list(await asyncio.gather(*waits))

    def _starts(self, calls: Sequence[Any], what: str) -> list[Awaitable[Any]]:
        return [self._wait_rank(i, call, what, "start_timeout_s") for i, call in enumerate(calls)]

    async def _wait_rank(self, number: int, call: Any, what: str, setting: str) -> Any:
        try:
            return await wait_for(call, getattr(self._limits, setting), f"learner rank {number}", what, setting)
        except RayActorError as error:
            raise ClusterError(
                f"learner rank {number} died while it had to {what} (out of memory is the usual reason; its last words "
                "are in the Ray logs): continue from the last checkpoint with --resume"
            ) from error
