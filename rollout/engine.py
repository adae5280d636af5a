"""One vLLM engine in this process: token ids in, token-exact completions out, weights replaced in place.

A thread of its own owns the engine and is the only one that touches it: it builds it, steps it, and between two steps
runs what callers have posted. Callers may live in any event loop. vLLM is imported when an engine is built, never by
importing this module.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from rollout.config import RolloutConfig
from rollout.outbox import Outbox
from rollout.reasons import Reason, StepFailed
from rollout.types import Completion, GenerateRequest
from rollout.vllm_plugin.record import (
    EngineDiedError,
    EngineError,
    EngineStats,
    FinishedSequence,
    check_request,
    make_requests,
    read_completion,
    truncates,
)
from rollout.vllm_plugin.start import start_llm_engine
from rollout.vllm_plugin.update import begin_update, fall_asleep, finish_update, load_bucket

if TYPE_CHECKING:  # it imports torch
    from rollout.weight_sync import WeightBucket

__all__ = ["Engine", "EngineDiedError", "EngineError", "EngineStats"]

_ONE_PER_PROCESS = threading.Lock()
_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class _Call:
    """One `generate` call on its way: its completions fill up in the order of its seeds."""

    request: GenerateRequest
    future: asyncio.Future[tuple[Completion, ...]]
    completions: list[Completion | None]
    sequence_ids: list[str]


@dataclass(slots=True)
class _Sequence:
    """One request inside vLLM."""

    call: _Call
    place: int
    """Index among the call's seeds."""


class Engine:
    """A real vLLM engine (Model Runner V2, in process) that records kept sets and routes as it generates.

    `record_kept` and `record_routing` are switches of the whole engine. A model without experts has no routes: with
    `record_routing` its completions carry None. `max_model_len` bounds prompt plus completion, in tokens. Raises
    EngineError if vLLM cannot be started, or if this process already runs an engine: vLLM keeps global state.
    """

    def __init__(
        self,
        model_path: str,
        config: RolloutConfig,
        *,
        max_model_len: int,
        record_kept: bool,
        record_routing: bool,
        seed: int = 0,
    ) -> None:
        self._max_model_len = max_model_len
        self._record_kept = record_kept
        self._has_routes = record_routing
        self._can_sleep = config.sleep_while_training
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox = Outbox()
        self._sequences: dict[str, _Sequence] = {}
        self._doomed: list[str] = []
        """Sequences to be aborted after this step: nobody waits for them any more."""
        self._ids = itertools.count()
        self._stats = EngineStats()
        """But for the steps, which are counted more often than read."""
        self._num_steps = 0
        self._updating = False
        self._stopping = False
        self._refusal: Reason | None = None
        """Why generation is refused: a weight update failed. Lifted by a complete one."""
        self._death: Reason | None = None
        self._door = threading.Lock()
        """Guards `_death` against `_inbox`: nothing is posted to a thread that will not read it."""
        self._llm: Any = None
        self._vocab_size = 0
        start = {"max_model_len": max_model_len, "record_kept": record_kept, "record_routing": record_routing}
        if not _ONE_PER_PROCESS.acquire(blocking=False):
            raise EngineError("this process already runs an engine; shut it down, or start this one in another process")
        built: Future[None] = Future()

        def run() -> None:
            try:
                self._run(lambda: start_llm_engine(model_path, config, seed=seed, **start), built)
            finally:
                _ONE_PER_PROCESS.release()

        self._thread = threading.Thread(target=run, name="keel-engine", daemon=True)
        self._thread.start()
        built.result()

    async def generate(self, request: GenerateRequest) -> tuple[Completion, ...]:
        """One completion per seed, in the order of the seeds, each with a `Replay` of what was recorded.

        Cancelling the call aborts its sequences. Raises ValueError for a request that cannot be served, EngineError if
        the engine holds half-updated weights, EngineDiedError if it has failed.
        """
        check_request(request, max_model_len=self._max_model_len, vocab_size=self._vocab_size)
        future: asyncio.Future[tuple[Completion, ...]] = asyncio.get_running_loop().create_future()
        call = _Call(request, future, [None] * len(request.seeds), [])
        self._post(lambda: self._submit(call), future)
        future.add_done_callback(lambda done: self._forget(call) if done.cancelled() else None)
        return await future

    async def abort(self) -> None:
        """Ends every sequence now: the pending calls return what was drawn so far, finish reason `ABORT`."""
        await self._ask(self._abort_all)

    async def sleep(self) -> None:
        """Gives the GPU memory of weights and KV cache back until the next complete weight update; requests wait.

        Raises EngineError without `RolloutConfig.sleep_while_training`.
        """
        await self._ask(self._sleep)

    async def begin_weight_update(self) -> None:
        """Holds the engine between two steps; requests stay, new ones queue. An unfinished update is dropped first."""
        await self._ask(self._begin_update)

    async def load_weights(self, bucket: WeightBucket) -> None:
        """Loads some of the checkpoint's tensors, under their checkpoint names.

        Raises EngineError if they do not load: pending calls fail, and the engine refuses to generate until a complete
        update has succeeded.
        """
        await self._ask(lambda: self._load(bucket))

    async def finish_weight_update(self, policy_version: int) -> None:
        """Puts the new weights in force, empties every cache made with the old ones, and goes on.

        Sequences that were running continue: their context is computed again and the tokens drawn from here on carry
        `policy_version`. Raises EngineError as `load_weights` does, also if tensors are missing.
        """
        await self._ask(lambda: self._finish_update(policy_version))

    def stats(self) -> EngineStats:
        """The counters as they stand."""
        llm, stats = self._llm, replace(self._stats, num_steps=self._num_steps)
        if llm is None:
            return stats
        running, waiting = llm.engine_core.engine_core.scheduler.get_request_counts()
        return replace(stats, num_running=running, num_waiting=waiting)

    def shutdown(self) -> None:
        """Stops the thread and frees the engine; pending calls raise EngineDiedError. Safe to call again."""

        def stop() -> None:
            self._stopping = True

        self._inbox.put(stop)
        self._thread.join()

    # -- the caller's side ------------------------------------------------------------------------------------------

    def _post(self, command: Callable[[], None], future: asyncio.Future[Any] | None) -> None:
        """Has the engine's thread run `command` between two steps; what it raises ends up in the future, if any."""

        def run() -> None:
            try:
                if self._death is not None:
                    raise self._death.error()
                command()
            except StepFailed as failure:
                if future is not None:
                    self._outbox.reject(future, failure.reason.error())
                raise
            except BaseException as error:
                if future is not None:
                    self._outbox.reject(future, error)
                if not isinstance(error, Exception):
                    raise

        with self._door:
            if self._death is None:
                self._inbox.put(run)
                return
        if future is not None:
            future.set_exception(self._death.error())

    async def _ask(self, command: Callable[[], _T]) -> _T:
        future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._post(lambda: self._outbox.resolve(future, command()), future)
        return await future

    def _forget(self, call: _Call) -> None:
        """Aborts a call that nobody waits for any more."""
        self._post(lambda: self._drop(call), None)

    # -- the engine's thread ----------------------------------------------------------------------------------------

    def _run(self, start: Callable[[], Any], built: Future[None]) -> None:
        try:
            self._llm = start()
            model = self._llm.vllm_config.model_config
            self._vocab_size = model.get_vocab_size()
            self._has_routes = self._has_routes and model.is_moe
            self._core.scheduler.on_finished = self._hand_out
        except BaseException as error:
            self._death = Reason("vLLM could not be started", error)
            built.set_exception(self._death.error())
            return
        built.set_result(None)
        try:
            self._serve()
        except StepFailed as failure:
            self._die(failure.reason)
        except BaseException as error:
            self._die(Reason("the engine's thread died", error, EngineDiedError))
        else:
            self._die(Reason("the engine was shut down", kind=EngineDiedError))
        self._release()

    @property
    def _core(self) -> Any:
        """vLLM's `EngineCore`, which lives in this process."""
        return self._llm.engine_core.engine_core

    def _serve(self) -> None:
        while not self._stopping:
            if self._updating or not self._sequences:
                self._run_command()
            while not self._inbox.empty():
                self._run_command()
            if self._sequences and not self._updating and not self._stopping:
                self._step()

    def _run_command(self) -> None:
        """The next one that was posted."""
        self._inbox.get()()
        self._outbox.send()

    def _step(self) -> None:
        try:
            self._llm.step()
            self._num_steps += 1
            self._abort_doomed()
        except Exception as error:
            raise StepFailed from error
        self._outbox.send()

    def _submit(self, call: _Call) -> None:
        if self._refusal is not None:
            raise self._refusal.error()
        if call.future.cancelled():
            return
        sequence_ids = [str(next(self._ids)) for _ in call.request.seeds]
        try:
            requests = make_requests(self._core, sequence_ids, call.request, self._vocab_size)
            for place, (sequence_id, request) in enumerate(zip(sequence_ids, requests, strict=True)):
                self._core.add_request(request)
                self._sequences[sequence_id] = _Sequence(call, place)
                call.sequence_ids.append(sequence_id)
        except BaseException:
            self._drop(call)
            raise

    def _hand_out(self, finished: FinishedSequence) -> None:
        """Takes a sequence that ends inside vLLM, in the middle of a step."""
        sequence = self._sequences.pop(finished.request_id, None)
        if sequence is None:  # its call was dropped
            return
        call = sequence.call
        call.sequence_ids.remove(finished.request_id)
        self._stats = self._stats.with_finished(finished)
        try:
            call.completions[sequence.place] = self._read(finished, sequence)
        except EngineError as error:
            self._doomed += self._let_go(call)
            self._outbox.reject(call.future, error)
            return
        if not call.sequence_ids:
            completions = tuple(completion for completion in call.completions if completion is not None)
            self._outbox.resolve(call.future, completions)

    def _read(self, finished: FinishedSequence, sequence: _Sequence) -> Completion:
        request = sequence.call.request
        return read_completion(
            finished,
            request,
            request.seeds[sequence.place],
            has_kept=self._record_kept and truncates(request, self._vocab_size),
            has_routes=self._has_routes,
        )

    def _drop(self, call: _Call) -> None:
        """Aborts what is left of a call inside vLLM."""
        self._core.abort_requests(self._let_go(call))

    def _let_go(self, call: _Call) -> list[str]:
        """Forgets what is left of a call; returns the sequences that vLLM still has of it."""
        sequence_ids, call.sequence_ids = call.sequence_ids, []
        for sequence_id in sequence_ids:
            self._sequences.pop(sequence_id, None)
        return sequence_ids

    def _abort_doomed(self) -> None:
        if self._doomed:
            doomed, self._doomed = self._doomed, []
            self._core.abort_requests(doomed)

    def _abort_all(self) -> None:
        self._core.abort_requests(list(self._sequences))
        self._abort_doomed()

    def _sleep(self) -> None:
        if not self._can_sleep:
            raise EngineError("this engine was started without rollout.sleep_while_training and cannot sleep")
        self._updating = True
        with self._refusing("is needed: falling asleep failed"):
            fall_asleep(self._llm, self._step)

    def _begin_update(self) -> None:
        self._updating = True
        with self._refusing("could not begin"):
            begin_update(self._llm, self._step)

    def _load(self, bucket: WeightBucket) -> None:
        self._expect_update("load_weights")
        with self._refusing("could not load a bucket"):
            load_bucket(self._llm, bucket)

    def _finish_update(self, policy_version: int) -> None:
        self._expect_update("finish_weight_update")
        with self._refusing("could not be finished"):
            finish_update(self._llm, policy_version)
        self._stats = replace(self._stats, policy_version=policy_version)
        self._refusal = None
        self._updating = False

    def _expect_update(self, step: str) -> None:
        if not self._updating:
            raise EngineError(f"{step} without an update in progress; call begin_weight_update first")

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """Whatever goes wrong inside leaves weights that are neither old nor new: nothing may be drawn from them."""
        try:
            yield
        except Exception as error:
            self._updating = False
            self._refusal = Reason(f"a weight update {what}; run a complete one before generating", error)
            for call in self._pending_calls():
                self._drop(call)
                self._outbox.reject(call.future, self._refusal.error())
            raise self._refusal.error() from error

    def _pending_calls(self) -> set[_Call]:
        return {sequence.call for sequence in self._sequences.values()}

    def _die(self, reason: Reason) -> None:
        """From here on every call fails at once; so do those that wait for the thread."""
        with self._door:
            self._death = reason
        for call in self._pending_calls():
            self._outbox.reject(call.future, reason.error())
        self._sequences.clear()
        while not self._inbox.empty():
            self._inbox.get()()  # each command finds the engine dead and fails its caller
        self._outbox.send()

    def _release(self) -> None:
        """Frees the model and the KV cache, so that this process can build another engine."""
        llm, self._llm = self._llm, None
        llm.engine_core.shutdown()
        del llm
        gc.collect()
