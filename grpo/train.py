"""The training loop: draw groups, score them, assign advantages, train, send the weights back. It is the only one;
`max_off_policy_steps = 0` is the synchronous mode.

Consumes a checked run file; produces a run folder. Knows no actor, no model and no engine: those are behind `Cluster`.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import signal
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from grpo.advantage import Objective, assign_advantages
from grpo.assembly import make_cluster
from grpo.batch import plan_updates
from grpo.checkpoint import (
    TrainerState,
    complete_checkpoint,
    list_checkpoints,
    partial_dir,
    read_trainer_state,
)
from grpo.cluster import SyncResult
from grpo.config import TrainConfig
from grpo.drops import check_drops
from grpo.evaluate import evaluate
from grpo.judge import owned_judges
from grpo.pipeline import GroupPipeline, PipelineState
from grpo.preflight import Preflight, check, domain_weights, with_endpoints
from grpo.records.metrics import MetricsLog
from grpo.records.progress import Progress
from grpo.records.run_folder import SampleLog, begin_run, check_run_dir, delete_run, rewind
from grpo.records.step_metrics import fresh_mismatch, learner_metrics, rollout_metrics, sync_metrics
from grpo.sampling import DrawnGroup, GroupSampler
from rollout.tasks import TaskStream
from rollout.worker import RolloutWorker

T = TypeVar("T")


def train(
    config: TrainConfig,
    *,
    run_file: Path,
    resume: bool = False,
    fresh: bool = False,
    worker_class: type[RolloutWorker] = RolloutWorker,
) -> Path:
    """Runs (or continues) a training run to its end, or until Ctrl-C; returns the run folder.

    With `fresh` an earlier run in that folder is deleted, once it is sure that the new one can begin.

    Ctrl-C ends the step's training if it is under way, writes a checkpoint and stops; a second one stops at once.

    Raises:
        ConfigError: the run cannot work; nothing was started.
        ParityError: an engine does not hold the learner's weights.
        ClusterError: something did not come in time; says who waited for whom.
        JudgeServerError: a judge that the run starts itself did not come up.
        DropRateError: rewards could not be had for too many samples of a step; says which and why.
    """
    check_run_dir(config, resume=resume, fresh=fresh)
    preflight = check(config, run_file)
    if fresh:
        delete_run(config.run_dir)
    run_dir = begin_run(config, run_file=run_file, resume=resume)
    with owned_judges(config) as served, Progress(config.run.name) as progress:
        preflight = with_endpoints(preflight, served, run_file)
        trainer = Trainer(served, preflight, run_dir, progress, worker_class=worker_class)
        asyncio.run(trainer.run(resume=resume))
    return run_dir


class Trainer:
    """One run, from start to end."""

    def __init__(
        self,
        config: TrainConfig,
        preflight: Preflight,
        run_dir: Path,
        progress: Progress,
        *,
        worker_class: type[RolloutWorker],
    ) -> None:
        self.config, self.preflight, self.run_dir, self.progress = config, preflight, run_dir, progress
        self.cluster = make_cluster(config, preflight, worker_class=worker_class)
        self.sampler = GroupSampler(config, preflight, self.cluster)
        self.stream = TaskStream(
            preflight.tasks,
            seed=config.run.seed,
            shuffle=config.tasks.shuffle,
            domain_weights=domain_weights(config),
        )
        self.step = 0
        self.stop = asyncio.Event()
        self.drawing_since: float | None = None
        """When the engines began to draw the next step's groups, on `time.perf_counter`; None before."""

    async def run(self, *, resume: bool) -> None:
        """Brings the cluster up, trains, and takes it down whatever happens."""
        self._listen_for_ctrl_c()
        try:
            await self._unless_stopped(self._start(resume))
            if not self.stop.is_set():
                await self._loop()
                await self._finish()
        finally:
            self.cluster.shutdown()

    async def _loop(self) -> None:
        run, grpo = self.config.run, self.config.grpo
        while self.step < run.steps and not self.stop.is_set():
            started = time.perf_counter()
            since = started if self.drawing_since is None else self.drawing_since
            self.drawing_since = None
            groups = await self._unless_stopped(self._next_groups())
            if groups is None:
                break
            taken = time.perf_counter()
            check_drops([group.scored for group in groups], grpo.max_drop_rate)
            batch = assign_advantages([group.scored for group in groups], self._objective)
            updates = plan_updates(
                batch.samples,
                num_updates=grpo.updates_per_batch,
                num_ranks=self.config.learner.ranks,
                max_tokens=self.config.learner.max_tokens_per_microbatch,
                aggregation=grpo.loss_aggregation,
                share_prompts=self.cluster.shares_prompts,
            )
            results = await self.cluster.train(updates, self._dump_dir())
            trained = time.perf_counter()
            self.step += 1
            sync = await self._sync()
            metrics = {**rollout_metrics(groups, batch), **learner_metrics(results)}
            metrics |= fresh_mismatch(metrics, sync, is_probe_alike=self._probes_like_training())
            metrics |= self._times(groups, since, started, taken, trained, sync)
            metrics |= await self._unless_stopped(self._evaluate_if_due()) or {}
            metrics["time/step_s"] = time.perf_counter() - started
            self._report(groups, metrics)
            if run.checkpoint_every and self.step % run.checkpoint_every == 0:
                await self._checkpoint()

    async def _start(self, resume: bool) -> None:
        self.progress.note("starting Ray, the vLLM engines and the learner")
        await self.cluster.start()
        state = await self._restore() if resume else TrainerState(0, PipelineState(0))
        self.step = state.step
        self.pipeline = GroupPipeline(
            self._draw,
            groups_per_step=self.config.grpo.prompts_per_step,
            max_off_policy_steps=self.config.grpo.max_off_policy_steps,
            state=state.pipeline,
        )
        sync = await self._sync()
        self.metrics = MetricsLog(self.run_dir, tensorboard=self.config.run.tensorboard)
        self.samples = SampleLog(self.run_dir, samples_per_step=self.config.debug.samples_per_step)
        self.progress.start(self.config.run.steps, done=self.step)
        if not resume:
            first = await self._evaluate_if_due()
            self._write_metrics({**first, **sync_metrics(sync, 0)})

    async def _restore(self) -> TrainerState:
        """Continues from the last complete checkpoint, or from the start when there is none yet."""
        checkpoints = list_checkpoints(self.run_dir)
        if not checkpoints:
            self.progress.note("no complete checkpoint yet: starting from the base model")
            rewind(self.run_dir, -1)
            return TrainerState(0, PipelineState(0))
        state = read_trainer_state(checkpoints[-1])
        rewind(self.run_dir, state.step)
        await self.cluster.load(checkpoints[-1] / "learner")
        self.progress.note(f"resumed after step {state.step}")
        return state

    async def _finish(self) -> None:
        """The last checkpoint and, when the run came to its end, the model as a Hugging Face folder."""
        await self.pipeline.close()
        await self._checkpoint()
        if self.step >= self.config.run.steps:
            await self.cluster.export(self.run_dir / "model")
        else:
            self.progress.note(f"stopped after step {self.step}: continue with --resume")
        self.metrics.close()
        self.samples.close()

    async def _draw(self, index: int) -> DrawnGroup:
        return await self.sampler.draw(
            index, self.stream.task(index), num_samples=self.config.grpo.group_size, seed=self.config.run.seed
        )

    async def _sync(self) -> SyncResult:
        """Sends the weights; the next step's groups are drawn beside the probe, and nothing is trained on them before
        it has passed."""
        if self.step >= self.config.run.steps or self._is_evaluation_due:
            return await self.cluster.sync_weights()
        sync = await self.cluster.sync_weights(lambda: self.pipeline.start(self.config.grpo.prompts_per_step))
        self.drawing_since = sync.resumed_at
        return sync

    async def _next_groups(self) -> Sequence[DrawnGroup]:
        """The step's groups; with `refill_zero_signal`, more of them until enough carry a signal."""
        grpo = self.config.grpo
        if not grpo.refill_zero_signal:
            return await self.pipeline.take(grpo.prompts_per_step)
        limit = grpo.prompts_per_step * (1 + grpo.max_refills)
        return await self.pipeline.take(grpo.prompts_per_step, counts=self._has_signal, limit=limit)

    def _has_signal(self, group: DrawnGroup) -> bool:
        return bool(assign_advantages([group.scored], self._objective).samples)

    def _objective(self, domain: str) -> Objective:
        stability = self.config.stability_of(domain)
        return Objective(
            beta=stability.beta,
            delta=stability.delta,
            eps_low=stability.eps_low,
            eps_high=stability.eps_high,
            temperature=self.config.sampling_of(domain).temperature,
            unbiased_kl=stability.unbiased_kl,
        )

    def _probes_like_training(self) -> bool:
        """Whether the probe samples and replays as training does; with biased truncation it cannot see the bias."""
        return self.config.stability.keep_sampling_mask or not self.config.truncates

    def _times(
        self, groups: Sequence[DrawnGroup], since: float, started: float, taken: float, trained: float, sync: SyncResult
    ) -> dict[str, float]:
        """Where the step's time went; generation ahead of the step shows only as far as the step waited for it."""
        generated = min(taken, max(started, *(group.generated_at for group in groups)))
        tokens = sum(answer.num_tokens for group in groups for answer in group.scored.answers)
        is_synchronous = self.config.grpo.max_off_policy_steps == 0
        generating = generated - since if is_synchronous else trained - started + sync.sync_s + sync.probe_s
        return {
            "rollout/tokens_per_s": tokens / generating if generating > 0 else math.nan,
            "time/generate_s": generated - started,
            "time/score_s": taken - generated,
            "time/train_s": trained - taken,
            **sync_metrics(sync, self.cluster.pool.num_restarts),
        }

    @property
    def _is_evaluation_due(self) -> bool:
        run = self.config.run
        return run.eval_every > 0 and (self.step % run.eval_every == 0 or self.step >= run.steps)

    async def _evaluate_if_due(self) -> dict[str, float]:
        run = self.config.run
        if not self._is_evaluation_due:
            return {}
        started = time.perf_counter()
        metrics = await evaluate(self.sampler, self.preflight.eval_tasks, num_samples=run.eval_samples, seed=run.seed)
        return {**metrics, "time/eval_s": time.perf_counter() - started}

    def _report(self, groups: Sequence[DrawnGroup], metrics: dict[str, float]) -> None:
        self.samples.write(self.step, [group.scored for group in groups])
        self._write_metrics(metrics)

    def _write_metrics(self, metrics: dict[str, float]) -> None:
        self.metrics.write(self.step, metrics)
        self.progress.update(self.step, metrics)

    async def _checkpoint(self) -> None:
        partial = partial_dir(self.run_dir, self.step)
        shutil.rmtree(partial, ignore_errors=True)
        await self.cluster.save(partial.resolve() / "learner")
        state = TrainerState(self.step, self.pipeline.state)
        complete_checkpoint(self.run_dir, state, self.config.run.keep_checkpoints)

    def _dump_dir(self) -> Path | None:
        if not self.config.debug.dump_batches:
            return None
        folder = self.run_dir.resolve() / "batches" / f"step-{self.step + 1:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _listen_for_ctrl_c(self) -> None:
        loop = asyncio.get_running_loop()
        main = asyncio.current_task()

        def on_interrupt() -> None:
            if self.stop.is_set() and main is not None:
                main.cancel()
            self.progress.note("stopping: the checkpoint is being written (Ctrl-C again stops at once)")
            self.stop.set()

        loop.add_signal_handler(signal.SIGINT, on_interrupt)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The work's result, or None if Ctrl-C came first; the work is cancelled then."""
        task, stopped = asyncio.create_task(work), asyncio.create_task(self.stop.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None
