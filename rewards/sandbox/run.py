"""The outside of the jail: files and commands in, one `Outcome` per command out.

Starts the launcher (`jail`) as a fresh interpreter; knows which kinds of isolation this machine allows.
"""

from __future__ import annotations

import dataclasses
import io
import marshal
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from types import TracebackType

from rewards.sandbox import kernel, seccomp

PYTHON = os.path.realpath(sys.executable)
PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_LAUNCH = "import sys; sys.path.append(sys.argv[1]); from rewards.sandbox.jail import main; main()"
_LAUNCHER = (PYTHON, "-I", "-S", "-E", "-c", _LAUNCH, PACKAGE_ROOT)
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
_GRACE_SECONDS = 20.0
"""For the launcher itself, on top of its commands' limits, on a busy machine."""


class SandboxError(RuntimeError):
    """The jail could not be built or run: the machine's or Keel's fault, never the tested program's."""


class Isolation(StrEnum):
    """What separates a tested program from the machine; the package's docstring says what each one covers."""

    NAMESPACES = "namespaces"
    LANDLOCK = "landlock"
    LIMITS = "limits"

    def at_least(self, other: Isolation) -> bool:
        """Whether this is as strong as `other`."""
        order = list(Isolation)
        return order.index(self) <= order.index(other)


class Cause(StrEnum):
    """Why a command ended."""

    EXIT = "exit"
    """By itself: see `exit_code` and `signal`."""
    TIMEOUT = "timeout"
    MEMORY = "memory"
    PROCESSES = "processes"
    OUTPUT = "output"
    CANNOT_START = "cannot_start"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one command may use."""

    seconds: float = 5.0
    """Wall clock; CPU seconds are limited to the same, rounded up."""
    memory_bytes: int = 512 << 20
    """Per process, and resident in all processes together."""
    processes: int = 32
    """Processes and threads."""
    open_files: int = 64
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20
    """On stdout, and again on stderr."""
    limit_address_space: bool = True
    """Off for runtimes that reserve far more than they use (Node, Java); `memory_bytes` of data still holds."""


@dataclass(frozen=True, slots=True)
class Command:
    """One program to run, in a jail that earlier commands may have left files in."""

    argv: tuple[str, ...]
    """Starts with an absolute path."""
    stdin: str = ""
    limits: Limits = field(default_factory=Limits)
    must_succeed: bool = False
    """Later commands run only if this one exits with 0."""
    keep_fds: tuple[int, ...] = ()
    """Open descriptors that the program gets under the same numbers."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    cause: Cause
    exit_code: int | None
    """None if a signal ended it."""
    signal: int | None
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def succeeded(self) -> bool:
        return self.cause is Cause.EXIT and self.exit_code == 0


class Jail:
    """A running launcher. Leaving the context kills all that is left and removes its directory.

    Args:
        files: name -> text, written into the programs' working directory, /tmp.
        readable: absolute paths outside the system directories that programs may read and execute.
        disk_bytes: space in /tmp (namespaces only).
        isolation: default: the strongest that works here.
    """

    def __init__(
        self,
        files: Mapping[str, str],
        commands: Sequence[Command],
        *,
        readable: Sequence[str] = (),
        disk_bytes: int = 64 << 20,
        isolation: Isolation | None = None,
    ) -> None:
        isolation = isolation or strongest_isolation()
        self._root = tempfile.mkdtemp(prefix="keel-jail-")
        home = "/tmp" if isolation is Isolation.NAMESPACES else self._root
        environment = {**_ENVIRONMENT, "HOME": home, "TMPDIR": home}
        self._spec = {
            "isolation": isolation.value,
            "root": self._root,
            "readable": list(dict.fromkeys([sys.base_prefix, *readable])),
            "disk_bytes": disk_bytes,
            "files": dict(files),
            "commands": [_command_spec(command, environment) for command in commands],
        }
        self._seconds = sum(command.limits.seconds for command in commands) + _GRACE_SECONDS
        self._process = subprocess.Popen(
            _LAUNCHER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,
            pass_fds=sorted({descriptor for command in commands for descriptor in command.keep_fds}),
        )

    def __enter__(self) -> Jail:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Sends the commands off without waiting; `outcomes` must not be called afterwards."""
        assert self._process.stdin is not None
        self._process.stdin.write(marshal.dumps(self._spec))
        self._process.stdin.close()

    def outcomes(self) -> tuple[Outcome, ...]:
        """Waits for the end.

        Raises:
            SandboxError: the launcher failed; the message says how.
        """
        try:
            reports, errors = self._process.communicate(marshal.dumps(self._spec), timeout=self._seconds)
        except subprocess.TimeoutExpired:
            raise SandboxError(
                f"the sandbox did not answer within {self._seconds:.0f} s: is the machine overloaded?"
            ) from None
        if self._process.returncode != 0:
            raise SandboxError(f"the sandbox failed: {errors.decode(errors='replace').strip()[-2000:]}")
        stream = io.BytesIO(reports)
        return tuple(_outcome(marshal.load(stream)) for _ in iter(lambda: stream.tell() < len(reports), False))

    def kill(self) -> None:
        """Ends everything in the jail. Safe to call twice."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None and not pipe.closed:
                pipe.close()
        shutil.rmtree(self._root, ignore_errors=True)


def run(
    files: Mapping[str, str],
    commands: Sequence[Command],
    *,
    readable: Sequence[str] = (),
    disk_bytes: int = 64 << 20,
    isolation: Isolation | None = None,
) -> tuple[Outcome, ...]:
    """Runs commands one after the other in one jail; arguments as for `Jail`. Between two commands every process of the
    first is killed; its files stay.

    Returns:
        One outcome per command; fewer when one that `must_succeed` did not.

    Raises:
        SandboxError: the jail could not be built, or a command's program cannot be executed.
    """
    with Jail(files, commands, readable=readable, disk_bytes=disk_bytes, isolation=isolation) as jail:
        outcomes = jail.outcomes()
    for command, outcome in zip(commands, outcomes, strict=False):
        if outcome.cause is Cause.CANNOT_START:
            raise SandboxError(
                f"{command.argv[0]} cannot be started in the sandbox: {outcome.stderr.decode(errors='replace')}"
            )
    return outcomes


def _command_spec(command: Command, environment: Mapping[str, str]) -> dict[str, object]:
    return {
        "argv": list(command.argv),
        "stdin": command.stdin,
        "environment": dict(environment),
        "must_succeed": command.must_succeed,
        "keep_fds": list(command.keep_fds),
        **dataclasses.asdict(command.limits),
    }


def _outcome(report: dict[str, object]) -> Outcome:
    report["cause"] = Cause(str(report["cause"]))
    return Outcome(**report)  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=1)
def isolation_report() -> Mapping[Isolation, str]:
    """Tries each isolation once: an empty text where it works, else what refused it."""
    return {isolation: _try(isolation) for isolation in Isolation}


def strongest_isolation() -> Isolation:
    """The strongest isolation that works on this machine.

    Raises:
        SandboxError: not even the weakest does.
    """
    report = isolation_report()
    for isolation, refusal in report.items():
        if not refusal:
            return isolation
    raise SandboxError("; ".join(f"{isolation}: {refusal}" for isolation, refusal in report.items()))


def _try(isolation: Isolation) -> str:
    if sys.platform != "linux":
        return "the sandbox needs Linux"
    if isolation is Isolation.LANDLOCK and kernel.landlock_abi() == 0:
        return "this kernel has no Landlock (5.13 or newer, and `landlock` among the boot option lsm=)"
    if isolation is not Isolation.NAMESPACES and not seccomp.available():
        return f"no seccomp filter for {os.uname().machine}"
    command = Command((PYTHON, "-I", "-S", "-E", "-c", "print(6 * 7)"), limits=Limits(seconds=30.0))
    try:
        outcome = run({}, [command], isolation=isolation)[0]
    except SandboxError as error:
        return str(error)
    return "" if outcome.stdout == b"42\n" else f"a test program ended with {outcome}"
