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
from collections.abc import Awaitable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from rewards.load import LoadedReward, RewardError, load_reward
from rewards.outcome import ABSTAINED, MEMORY, TIMEOUT, BadResult, Outcome, read_group, read_result
from rewards.types import Abstain, Answer
from rewards.wire import Batch, Hello, end_event, event, receive
from rollout.types import Task

MAX_ASYNC_CALLS = 128
"""Asynchronous calls under way at a time; the others wait their turn, and their timeouts have not begun."""
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
        self._sock, self._slot = sock, slot
        self._send_lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._turn = asyncio.Semaphore(MAX_ASYNC_CALLS)
        self._under_way: set[Future[None]] = set()

    def serve(self) -> None:
        """Loads the functions, then makes calls until the parent is gone."""
        hello = receive(self._sock)
        if not isinstance(hello, Hello):
            return
        try:
            self._rewards = {spec.key: load_reward(spec.config, base_dir=spec.base_dir) for spec in hello.specs}
        except RewardError as error:
            self._send(event("refused", message=str(error)))
            return
        _limit_memory(max((spec.config.memory_gib for spec in hello.specs), default=0.0))
        self._send(event("ready"))
        threading.Thread(target=self._loop.run_forever, name="async rewards", daemon=True).start()
        threading.Thread(target=self._read_calls, name="calls", daemon=True).start()
        while True:
            self._call_sync(self._queue.get())

    def _send(self, line: bytes) -> None:
        with self._send_lock:
            self._sock.sendall(line)

    def _read_calls(self) -> None:
        while isinstance(batch := receive(self._sock), Batch):
            reward = self._rewards[batch.key]
            for number, answers in batch.calls:
                call = _Call(number, reward, batch.task, answers, batch.check)
                if reward.spec.is_async:
                    future = asyncio.run_coroutine_threadsafe(self._call_async(call), self._loop)
                    self._under_way.add(future)  # the loop itself keeps no strong reference
                    future.add_done_callback(self._under_way.discard)
                else:
                    self._queue.put(call)
        os.killpg(0, signal.SIGKILL)

    def _call_sync(self, call: _Call) -> None:
        self._send(event("start", call=call.id))
        started, before = time.perf_counter(), _snapshot(call)
        try:
            result = call.reward.fn(call.task, _argument(call), **call.reward.kwargs)
            if inspect.isawaitable(result):  # a plain function that returns a coroutine
                result = asyncio.run_coroutine_threadsafe(_awaited(result), self._loop).result()
            outcomes = _read(call, result)
        except BaseException as error:  # a user's function may fail in any way, SystemExit included
            outcomes = [_failure(error)] * len(call.answers)
        self._end(call, outcomes, started, before)

    async def _call_async(self, call: _Call) -> None:
        async with self._turn:
            self._send(event("start", call=call.id))
            started, before = time.perf_counter(), _snapshot(call)
            limit = asyncio.timeout(call.reward.spec.config.timeout_s)
            try:
                async with limit:
                    result = await _Marked(call, self._slot)
                outcomes = _read(call, result)
            except BaseException as error:  # as above; nothing cancels these tasks but their own limit
                failure = Outcome(cause=TIMEOUT) if limit.expired() else _failure(error)
                outcomes = [failure] * len(call.answers)
            self._end(call, outcomes, started, before)

    def _end(self, call: _Call, outcomes: Sequence[Outcome], started: float, before: bytes | None) -> None:
        seconds = time.perf_counter() - started
        mutated = before is not None and _snapshot(call) != before
        self._send(end_event(call.id, [replace(o, seconds=seconds, mutated=mutated) for o in outcomes]))


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
    return Outcome(cause=type(error).__name__, detail="".join(traceback.format_exception(error))[-MAX_DETAIL:])


def _snapshot(call: _Call) -> bytes | None:
    return pickle.dumps((call.task, call.answers)) if call.check else None


def _limit_memory(gib: float) -> None:
    """Allows this process and each of its children so many GiB of data above what it holds now."""
    if sys.platform != "linux":
        return
    with open("/proc/self/status", encoding="ascii") as status:
        held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    limit = held + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
