"""Runs reward functions in a child process, so that nothing they do can hurt the process that asks.

Jobs in (one reward function, one task, its answers), one `Outcome` per answer out. A call that raises, returns
nonsense, takes too long, ends or crashes its process, eats memory or floods the output costs its own sample: the child
is replaced where it must be, and the calls that were waiting or under way beside the culprit are made again.

Who is to blame when the child dies: the synchronous call that had begun, or the asynchronous call whose code was
running. If that leaves more than one suspect, each is tried again alone.

Not covered: a process that the function put into a session of its own outlives the child if the child dies by itself.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.load import RewardError, RewardSpec
from rewards.outcome import FLOODED, MEMORY, TIMEOUT, Outcome
from rewards.process import RewardProcess, describe_exit
from rewards.types import Answer
from rewards.wire import Batch, read_calls
from rollout.types import Task

ASYNC_GRACE_S = 2.0
"""An asynchronous call ends itself at its timeout; only if it does not, the process is killed."""
MAX_IDLE_DEATHS = 3
"""A child that dies this often in a row while no call is under way stops the run: no sample can be blamed."""


@dataclass(frozen=True, slots=True)
class Job:
    """Answers of one task for one reward function."""

    key: str
    """Of the function's `RewardSpec`."""
    task: Task
    answers: tuple[Answer, ...]
    check: bool = False
    """Look for changes to task and answers."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A job on its way: `done` when all of its calls have ended."""

    job: Job
    done: asyncio.Future[None]
    num_open: int


@dataclass(slots=True, eq=False)
class _Call:
    """One call of the function: one answer, or all of them if it is per group."""

    id: int
    asked: _Asked
    spec: RewardSpec
    answers: tuple[Answer, ...]
    deadline: float = math.inf
    """Loop time; infinite while it has not begun."""
    outcomes: tuple[Outcome, ...] = ()

    @property
    def started(self) -> bool:
        return self.deadline < math.inf


class RewardWorker:
    """Owns one child process at a time. Synchronous functions run one call after the other, asynchronous ones
    together."""

    def __init__(self, specs: Sequence[RewardSpec], *, cwd: Path | None = None) -> None:
        """
        Args:
            specs: everything that jobs may name; imported when a child starts.
            cwd: where the child runs; default: here.
        """
        self._specs = {spec.key: spec for spec in specs}
        self._cwd = cwd
        self._pending: dict[int, _Call] = {}
        self._next_id = 1
        self._idle_deaths = 0
        self._suspects: list[_Call] = []
        self._verdict: tuple[str, list[_Call]] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        """Rings at the earliest deadline, or before; one for all calls, since most end long before theirs."""
        self._process: RewardProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self.num_restarts = 0

    async def start(self) -> None:
        """Starts the child.

        Raises:
            RewardError: it cannot load the functions.
        """
        self._process = await self._new_process()
        self._supervisor = asyncio.create_task(self._supervise(), name="reward worker")

    async def run(self, job: Job) -> list[Outcome]:
        """One outcome per answer, in their order.

        Raises:
            RewardError: no child can be started any more.
        """
        assert self._supervisor is not None, "start() comes first"
        if self._supervisor.done():
            if not self._supervisor.cancelled():
                self._supervisor.result()
            raise RewardError("rewards: the reward worker was closed")
        spec = self._specs[job.key]
        parts = [job.answers] if spec.per_group else [(answer,) for answer in job.answers]
        asked = _Asked(job, asyncio.get_running_loop().create_future(), len(parts))
        calls = [self._new_call(asked, spec, answers) for answers in parts]
        if not self._suspects:
            self._send(calls)
        try:
            await asked.done
        finally:
            self._forget(calls)
        return [outcome for call in calls for outcome in call.outcomes]

    async def is_alive(self) -> bool:
        """Answers as long as this process does."""
        return True

    async def close(self) -> None:
        """Ends the child and everything it started."""
        self._stop_alarm()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._process is not None:
            self._process.kill()
            await self._process.closed

    def _new_call(self, asked: _Asked, spec: RewardSpec, answers: tuple[Answer, ...]) -> _Call:
        call = _Call(self._next_id, asked, spec, answers)
        self._pending[call.id] = call
        self._next_id += 1
        return call

    def _end(self, call: _Call, outcomes: tuple[Outcome, ...]) -> None:
        call.outcomes = outcomes
        asked = call.asked
        asked.num_open -= 1
        if asked.num_open == 0 and not asked.done.done():
            asked.done.set_result(None)
        self._forget([call])

    def _forget(self, calls: Iterable[_Call]) -> None:
        """Strikes off calls that have ended, or that nobody waits for any more; the next suspect's turn may come."""
        for call in calls:
            self._pending.pop(call.id, None)
        on_trial = self._suspects[:1]
        self._suspects = [suspect for suspect in self._suspects if suspect.id in self._pending]
        if on_trial and self._suspects[:1] != on_trial:
            self._send(self._next_calls())

    def _next_calls(self) -> list[_Call]:
        """What the child may be given: one suspect alone, else everything."""
        return self._suspects[:1] or list(self._pending.values())

    def _send(self, calls: Iterable[_Call]) -> None:
        """Hands calls to the child, those of one job together; without a child they stay pending."""
        if self._process is None:
            return
        by_job: dict[_Asked, list[_Call]] = {}
        for call in calls:
            by_job.setdefault(call.asked, []).append(call)
        for asked, of_job in by_job.items():
            job, parts = asked.job, tuple((call.id, call.answers) for call in of_job)
            self._process.send(Batch(job.key, job.task, parts, job.check))

    async def _supervise(self) -> None:
        """Replaces the child whenever it dies, and makes the calls again that were not to blame."""
        try:
            while True:
                assert self._process is not None
                await asyncio.shield(self._process.closed)
                process, self._process = self._process, None
                self._after_death(process)
                self._process = await self._new_process()
                self.num_restarts += 1
                self._send(self._next_calls())
        except RewardError as error:
            for asked in {call.asked for call in self._pending.values()}:
                if not asked.done.done():
                    asked.done.set_exception(error)
            raise

    async def _new_process(self) -> RewardProcess:
        process = RewardProcess(tuple(self._specs.values()), self._cwd, self._on_event)
        process.on_flood = lambda: self._condemn(FLOODED, None)
        try:
            await process.wait_ready()
        except BaseException:  # cancelled while it starts, too
            process.kill()
            await process.closed
            raise
        return process

    def _on_event(self, event: dict[str, Any]) -> None:
        """Calls that are not pending were condemned, or cancelled, in the meantime."""
        ended, started = read_calls(event)
        for number, outcomes in ended:
            if (call := self._pending.get(number)) is not None:
                self._on_end(call, outcomes)
        for number in started:
            if (call := self._pending.get(number)) is not None:
                self._on_start(call)

    def _on_start(self, call: _Call) -> None:
        limit = call.spec.config.timeout_s + (ASYNC_GRACE_S if call.spec.is_async else 0.0)
        call.deadline = asyncio.get_running_loop().time() + limit
        if self._alarm is None or call.deadline < self._alarm.when():
            self._set_alarm(call.deadline)

    def _set_alarm(self, when: float) -> None:
        self._stop_alarm()
        self._alarm = asyncio.get_running_loop().call_at(when, self._ring)

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None

    def _ring(self) -> None:
        """Condemns the call whose deadline has passed; if it has ended in time, waits for the next one's."""
        self._alarm = None
        first = min(
            (call for call in self._pending.values() if call.started), key=lambda call: call.deadline, default=None
        )
        if first is None:
            return
        if first.deadline <= asyncio.get_running_loop().time():
            self._condemn(TIMEOUT, first)
        else:
            self._set_alarm(first.deadline)

    def _on_end(self, call: _Call, outcomes: tuple[Outcome, ...]) -> None:
        self._idle_deaths = 0
        self._end(call, outcomes)
        if self._process is None:
            return
        self._process.num_output_bytes = 0
        if any(outcome.cause == MEMORY for outcome in outcomes):
            self._verdict = (MEMORY, [])
            self._process.kill()  # what it hoards would cost the next call too

    def _condemn(self, cause: str, call: _Call | None) -> None:
        """Kills the child because of a call that is under way; None: whichever runs."""
        process = self._process
        if process is None or self._verdict is not None:
            return
        running = self._pending.get(process.running_async_call)
        if call is not None and call.spec.is_async and running is not None:
            culprits = [running]  # it blocks the others' event loop
        elif call is not None:
            culprits = [call]
        else:
            culprits = self._under_way(process)
        self._verdict = (cause, culprits)
        process.kill()

    def _under_way(self, process: RewardProcess) -> list[_Call]:
        """Those whose code may have been running: the started synchronous call, the marked asynchronous one; without
        either, every started one."""
        started = [call for call in self._pending.values() if call.started]
        running = [c for c in started if not c.spec.is_async or c.id == process.running_async_call]
        return running or started

    def _after_death(self, process: RewardProcess) -> None:
        cause, culprits = self._verdict or (describe_exit(process.exit_status), self._under_way(process))
        condemned = self._verdict is not None
        self._verdict = None
        if not culprits and not condemned:
            self._count_idle_death(process)
        not_ended = [call for call in culprits if call.id in self._pending]
        if len(culprits) > 1:
            self._suspects = not_ended
        else:
            for call in not_ended:
                seconds = call.spec.config.timeout_s if cause == TIMEOUT else 0.0
                outcome = Outcome(cause=cause, detail=process.last_words, seconds=seconds)
                self._end(call, (outcome,) * len(call.answers))
        self._stop_alarm()
        for call in self._pending.values():
            call.deadline = math.inf

    def _count_idle_death(self, process: RewardProcess) -> None:
        self._idle_deaths += 1
        if self._idle_deaths >= MAX_IDLE_DEATHS:
            raise RewardError(
                f"rewards: the reward process died {self._idle_deaths} times while no reward function ran "
                f"({describe_exit(process.exit_status)}); its last words:\n{process.last_words}"
            )
