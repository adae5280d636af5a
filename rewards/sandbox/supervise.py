"""Runs one command of a jail to its end: feeds it, drains it, watches time, memory and processes, then kills all of it.

Runs inside the launcher (standard library only), as the parent of the tested program.
"""

from __future__ import annotations

import os
import select
import sys
import time

from rewards.sandbox import kernel

TYPE_CHECKING = False  # as `typing` has it; see `kernel`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_TICK_SECONDS = 0.02
_KILL_SECONDS = 0.001
_PAGE = os.sysconf("SC_PAGE_SIZE")
_CHUNK = 1 << 16
_CANNOT_START = 125


def run(command: dict[str, Any], enter: Callable[[], None], isolation: str) -> dict[str, Any]:
    """Runs `command` and reports.

    Args:
        command: one element of the launcher's `commands`.
        enter: called in the child just before `execve`; an exception there is reported as `cannot_start`.

    Returns:
        `cause` (`exit`, `timeout`, `memory`, `processes`, `output` or `cannot_start`), `exit_code` (None if a signal
        ended it), `signal`, `stdout`, `stderr`, `seconds`.
    """
    out, out_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    err, err_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(out_end, True)
    os.set_blocking(err_end, True)
    stdin = _as_file(command["stdin"].encode("utf-8", "surrogatepass"))
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _start(command, enter, stdin, out_end, err_end)
    for descriptor in (stdin, out_end, err_end, *command["keep_fds"]):
        os.close(descriptor)
    watch = _Watch(command, child, started, {out: bytearray(), err: bytearray()})
    cause = watch.until_done()
    seconds = time.monotonic() - started
    _kill_everything(isolation)
    watch.reap()
    cause = "output" if cause == "exit" and watch.drain() else cause
    os.close(out)
    os.close(err)
    return _report(watch, cause, seconds, (out, err))


def _report(watch: _Watch, cause: str, seconds: float, pipes: tuple[int, int]) -> dict[str, Any]:
    code = os.waitstatus_to_exitcode(watch.status)
    if cause == "exit" and code == -kernel.SIGXCPU:
        cause = "timeout"
    if cause == "exit" and code == _CANNOT_START and watch.output[pipes[1]].startswith(b"jail: "):
        cause = "cannot_start"
    stdout, stderr = (bytes(watch.output[pipe]) for pipe in pipes)
    return {
        "cause": cause,
        "exit_code": code if code >= 0 else None,
        "signal": -code if code < 0 else None,
        "stdout": stdout,
        "stderr": stderr,
        "seconds": seconds,
    }


def _as_file(data: bytes) -> int:
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC)
    while data:
        data = data[os.write(descriptor, data) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _start(command: dict[str, Any], enter: Callable[[], None], stdin: int, out: int, err: int) -> None:
    """The child; never returns."""
    try:
        os.setsid()
        kernel.restore_signals()
        for descriptor, target in ((stdin, 0), (out, 1), (err, 2)):
            os.dup2(descriptor, target)
        keep = command["keep_fds"]
        _close_all_but(keep)
        for descriptor in keep:
            os.set_inheritable(descriptor, True)
        enter()
        os.execve(command["argv"][0], command["argv"], command["environment"])
    except BaseException as error:
        os.write(2, f"jail: {type(error).__name__}: {error}".encode())
    finally:
        os._exit(_CANNOT_START)


def _close_all_but(keep: list[int]) -> None:
    first = 3
    for descriptor in sorted(keep):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


class _Watch:
    """The state of one running command."""

    def __init__(self, command: dict[str, Any], child: int, started: float, output: dict[int, bytearray]) -> None:
        self.command = command
        self.child = child
        self.output = output
        self.status: int = -1
        self.deadline = started + command["seconds"]
        self._open = set(output)

    def until_done(self) -> str:
        """Returns when the command has ended or must end, and says why."""
        poller = select.poll()
        for pipe in self.output:
            poller.register(pipe, select.POLLIN)
        end = os.pidfd_open(self.child)
        poller.register(end, select.POLLIN)
        try:
            while True:
                wait = min(_TICK_SECONDS, max(0.0, self.deadline - time.monotonic()))
                ready = [descriptor for descriptor, _ in poller.poll(wait * 1000)]
                for pipe in self._open.intersection(ready):
                    if not self._read(pipe):
                        poller.unregister(pipe)
                        self._open.discard(pipe)
                cause = self._verdict(end in ready)
                if cause:
                    return cause
        finally:
            os.close(end)

    def _verdict(self, ended: bool) -> str:
        if self._too_much_output():
            return "output"
        if ended:
            return "exit"
        if time.monotonic() > self.deadline:
            return "timeout"
        self._reap_ended()
        count, resident = usage()
        if resident > self.command["memory_bytes"]:
            return "memory"
        return "processes" if count > self.command["processes"] else ""

    def _too_much_output(self) -> bool:
        return any(len(data) > self.command["output_bytes"] for data in self.output.values())

    def _read(self, pipe: int) -> bool:
        """Whether more may come."""
        try:
            data = os.read(pipe, _CHUNK)
        except BlockingIOError:
            return True
        self.output[pipe] += data
        return bool(data)

    def drain(self) -> bool:
        """Takes what still lies in the pipes, after everything was killed. Returns whether it was too much."""
        for pipe in self._open:
            while select.select([pipe], [], [], 0)[0] and not self._too_much_output() and self._read(pipe):
                pass
        return self._too_much_output()

    def _reap_ended(self) -> None:
        """Orphans that ended would go on counting against the limit of processes."""
        self.reap(os.WNOHANG)

    def reap(self, options: int = 0) -> None:
        """Waits for every child there is, adopted ones included."""
        while True:
            try:
                pid, status = os.waitpid(-1, options)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.child:
                self.status = status


def usage() -> tuple[int, int]:
    """Processes (threads not counted) below this one, orphans that it adopted included, and the bytes of memory that
    they hold together."""
    count = resident = 0
    for pid in descendants():
        try:
            with open(f"/proc/{pid}/statm") as file:
                resident += int(file.read().split()[1]) * _PAGE
        except (OSError, IndexError):  # it ended meanwhile
            continue
        count += 1
    return count, resident


def descendants() -> list[int]:
    """Process ids of everything that this process started, directly or not."""
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        pid = waiting.pop()
        try:
            threads = os.listdir(f"/proc/{pid}/task")
            for thread in threads:
                with open(f"/proc/{pid}/task/{thread}/children") as file:
                    children = [int(word) for word in file.read().split()]
                found += children
                waiting += children
        except OSError:  # it ended meanwhile; its children come to this process
            continue
    return found


def _kill_everything(isolation: str) -> None:
    """As PID 1, one call reaches every process of the namespace at once. Otherwise everything is stopped first, so that
    nothing can start more, and killed after that, until nothing is left."""
    if isolation == "namespaces":
        _kill(-1, kernel.SIGKILL)
        return
    while pids := [pid for pid in descendants() if _alive(pid)]:
        for number in (kernel.SIGSTOP, kernel.SIGKILL):
            for pid in pids:
                _kill(pid, number)
        time.sleep(_KILL_SECONDS)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it ended meanwhile
        return


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


if sys.platform != "linux":
    raise ImportError("the sandbox needs Linux")
