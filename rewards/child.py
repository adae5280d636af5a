"""The process that reward functions run in; `rewards.process` starts it and ends it.

Three threads. The main one makes the calls of synchronous functions, one after the other (some functions need the main
thread, for alarms say). The second runs an event loop for asynchronous functions. The third reads calls from the
parent, and ends the process, with everything it started, when the parent is gone.

Standard output and error are the parent's pipe; the socket is not inherited by anything a function starts.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import mmap
import os
import pickle
import queue
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rewards.load import LoadedReward, RewardError, load_reward
from rewards.outcome import ABSTAINED, MEMORY, TIMEOUT, BadResult, Outcome, read_group, read_result
from rewards.types import Abstain, Answer
from rewards.wire import Batch, Hello, calls_event, event, receive
from rollout.types import Task

MAX_ASYNC_CALLS = 512
"""Asynchronous calls under way at a time; the others wait their turn, and their timeouts have not begun.

A process that waits for a judge of one second can score so many samples per second; an open file per call is in reach.
"""
TELL_WITHIN_S = 0.05
"""News of asynchronous calls waits for the end of the loop's turn, but not longer than this if a call holds it up."""
MAX_DETAIL = 4000
"""Characters of a traceback that are kept."""
SLOT_BYTES = 8
"""The page shared with the parent holds the id of the asynchronous call that is running, 0 for none."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True, slots=True)
class _Call:
    id: int
    reward: LoadedReward
    task: Task
    answers: tuple[Answer, ...]
    check: bool


_Ended = tuple[int, list[Outcome]]
"""The id of a call that has ended, and one outcome per answer."""


def main() -> None:
    """`python -c "from rewards.child import main; main()" SOCKET_FD SLOT_FD`."""
    sock_fd, slot_fd = int(sys.argv[1]), int(sys.argv[2])
    for fd in (sock_fd, slot_fd):
        os.set_inheritable(fd, False)
    slot = mmap.mmap(slot_fd, SLOT_BYTES)
    if sys.platform == "linux":  # end with the parent; keep orphans of ours below us, so that they end with us
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    Child(socket.socket(fileno=sock_fd), slot).serve()


class Child:
    """Everything inside the process."""

    def __init__(self, sock: socket.socket, slot: mmap.mmap) -> None:
        self._sock, self._stream = sock, sock.makefile("rb")
        self._send_lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._async_calls = _AsyncCalls(self._send, slot)

    def serve(self) -> None:
        """Loads the functions, then makes calls until the parent is gone."""
        hello = receive(self._stream)
        if not isinstance(hello, Hello):
            return
        try:
            self._rewards = {spec.key: load_reward(spec.config, base_dir=spec.base_dir) for spec in hello.specs}
        except RewardError as error:
            self._send(event("refused", message=str(error)))
            return
        _limit_memory(max((spec.config.memory_gib for spec in hello.specs), default=0.0))
        self._send(event("ready"))
        threading.Thread(target=self._async_calls.loop.run_forever, name="async rewards", daemon=True).start()
        threading.Thread(target=self._read_calls, name="calls", daemon=True).start()
        ended: list[_Ended] = []
        while True:
            if ended and self._queue.empty():
                self._send(calls_event(ended=ended))
                ended = []
            call = self._queue.get()
            self._send(calls_event(ended=ended, started=[call.id]))
            ended = [self._call_sync(call)]

    def _send(self, line: bytes) -> None:
        with self._send_lock:
            self._sock.sendall(line)

    def _read_calls(self) -> None:
        while isinstance(batch := receive(self._stream), Batch):
            reward = self._rewards[batch.key]
            calls = [_Call(number, reward, batch.task, answers, batch.check) for number, answers in batch.calls]
            if reward.spec.is_async:
                self._async_calls.hand_over(calls)
            else:
                for call in calls:
                    self._queue.put(call)
        os.killpg(0, signal.SIGKILL)

    def _call_sync(self, call: _Call) -> _Ended:
        call, before = _guarded(call)
        started = time.perf_counter()
        try:
            result = call.reward.fn(call.task, _argument(call), **call.reward.kwargs)
            if inspect.isawaitable(result):  # a plain function that returns a coroutine
                result = asyncio.run_coroutine_threadsafe(_awaited(result), self._async_calls.loop).result()
            outcomes = _read(call, result)
        except BaseException as error:  # a user's function may fail in any way, SystemExit included
            outcomes = [_failure(error)] * len(call.answers)
        return _end(call, outcomes, started, before)


class _AsyncCalls:
    """The calls of asynchronous functions, all in one event loop of one thread.

    What begins or ends in one turn of the loop is told in one message. A call is announced before its code runs; if the
    calls before it hold the loop up, it is announced again: its timeout begins with its code.
    """

    def __init__(self, send: Callable[[bytes], None], slot: mmap.mmap) -> None:
        self.loop = asyncio.new_event_loop()
        self._send, self._slot = send, slot
        self._waiting: deque[_Call] = deque()
        self._is_called = False
        """`_start_waiting` will run."""
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self._not_begun: dict[int, float] = {}
        """When the calls were announced that wait for the loop to run their code."""
        self._ended: list[_Ended] = []
        """Not told yet, the oldest of them since `_untold_since`."""
        self._untold_since = 0.0

    def hand_over(self, calls: Sequence[_Call]) -> None:
        """Has the calls made as soon as there is room for them; called from another thread."""
        self._waiting.extend(calls)
        if not self._is_called:
            self._is_called = True
            self.loop.call_soon_threadsafe(self._start_waiting)

    def _start_waiting(self) -> None:
        """Announces and starts as many calls as there is room for; tells what has ended."""
        self._is_called = False  # before it looks: what is handed over from now on calls again
        room = MAX_ASYNC_CALLS - len(self._under_way)
        calls = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if calls or self._ended:
            self._tell(started=[call.id for call in calls])
        self._not_begun |= dict.fromkeys((call.id for call in calls), time.perf_counter())
        for call in calls:  # the loop itself keeps no strong reference to its tasks
            self._under_way[call.id] = self.loop.create_task(self._call(call))

    def _tell(self, *, started: Sequence[int] = ()) -> None:
        ended, self._ended = self._ended, []
        self._send(calls_event(ended=ended, started=started))

    def _on_begin(self, call: _Call) -> None:
        now = time.perf_counter()
        if now - self._not_begun.pop(call.id) > TELL_WITHIN_S:
            self._tell(started=[call.id, *self._not_begun])
            self._not_begun = dict.fromkeys(self._not_begun, now)

    async def _call(self, call: _Call) -> None:
        self._on_begin(call)
        call, before = _guarded(call)
        started = time.perf_counter()
        limit = asyncio.timeout(call.reward.spec.config.timeout_s)
        try:
            async with limit:
                result = await _Marked(call, self._slot)
            outcomes = _read(call, result)
        except BaseException as error:  # as above; nothing cancels these tasks but their own limit
            failure = Outcome(cause=TIMEOUT) if limit.expired() else _failure(error)
            outcomes = [failure] * len(call.answers)
        self._on_end(call, _end(call, outcomes, started, before))

    def _on_end(self, call: _Call, ended: _Ended) -> None:
        now = time.perf_counter()
        if not self._ended:
            self._untold_since = now
            self.loop.call_soon(self._start_waiting)
        del self._under_way[call.id]
        self._ended.append(ended)
        if now - self._untold_since > TELL_WITHIN_S:
            self._tell()


class _Marked:
    """Awaits a call and keeps its id in the slot while its own code runs, so that the parent knows whom to blame when
    the process dies or blocks."""

    def __init__(self, call: _Call, slot: mmap.mmap) -> None:
        self._call, self._slot = call, slot

    def __await__(self) -> Generator[Any, Any, Any]:
        self._mark(self._call.id)
        try:
            call = self._call
            steps = call.reward.fn(call.task, _argument(call), **call.reward.kwargs).__await__()
            action, argument = steps.send, None
            while True:
                try:
                    waited_for = action(argument)
                except StopIteration as stop:
                    return stop.value
                self._mark(0)
                try:
                    argument = yield waited_for
                    action = steps.send
                except BaseException as error:  # passed on into the call, cancellation above all
                    action, argument = steps.throw, error
                self._mark(self._call.id)
        finally:
            self._mark(0)

    def _mark(self, number: int) -> None:
        self._slot[:] = number.to_bytes(SLOT_BYTES, "little")


def _end(call: _Call, outcomes: Sequence[Outcome], started: float, before: bytes | None) -> _Ended:
    seconds = time.perf_counter() - started
    mutated = before is not None and _is_changed(call, before)
    return call.id, [replace(outcome, seconds=seconds, mutated=mutated) for outcome in outcomes]


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def _argument(call: _Call) -> Answer | tuple[Answer, ...]:
    return call.answers if call.reward.spec.per_group else call.answers[0]


def _read(call: _Call, result: object) -> list[Outcome]:
    results = read_group(result, len(call.answers)) if call.reward.spec.per_group else [result]
    return [_read_one(one) for one in results]


def _read_one(result: object) -> Outcome:
    try:
        value, parts = read_result(result)
    except (BadResult, Abstain) as error:
        return _failure(error)
    return Outcome(value, parts)


def _failure(error: BaseException) -> Outcome:
    if isinstance(error, Abstain):
        return Outcome(cause=ABSTAINED, detail=str(error))
    if isinstance(error, BadResult):
        return Outcome(cause=str(error))
    if isinstance(error, MemoryError):
        return Outcome(cause=MEMORY)
    return Outcome(cause=type(error).__name__, detail=_traceback(error)[-MAX_DETAIL:])


def _traceback(error: BaseException) -> str:
    """Without this file's frames, which say nothing about the function."""
    rest = error.__traceback__
    while rest is not None and rest.tb_frame.f_code.co_filename == __file__:
        rest = rest.tb_next
    return "".join(traceback.format_exception(type(error), error, rest))


def _guarded(call: _Call) -> tuple[_Call, bytes | None]:
    """For a call whose changes are looked for: with a copy of task and answers, which it shares with no other call, and
    what that copy looks like; else the call itself."""
    if not call.check:
        return call, None
    task, answers = pickle.loads(pickle.dumps((call.task, call.answers)))
    return replace(call, task=task, answers=answers), pickle.dumps((task, answers))


def _is_changed(call: _Call, before: bytes) -> bool:
    try:
        return pickle.dumps((call.task, call.answers)) != before
    except Exception:  # what was put into it cannot be pickled
        return True


def _limit_memory(gib: float) -> None:
    """Allows this process and each of its children so many GiB of data above what it holds now."""
    if sys.platform != "linux":
        return
    with open("/proc/self/status", encoding="ascii") as status:
        held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    limit = held + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
