"""Attacks on what lies outside the jail, in every kind of isolation that this machine allows."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rewards.sandbox import run as sandbox
from rewards.sandbox.run import PYTHON, Command, Isolation
from tests.rewards.jailed import CLOSED, WORKING, python


@pytest.fixture(params=WORKING)
def isolation(request: pytest.FixtureRequest) -> Isolation:
    return request.param


@pytest.fixture(params=CLOSED)
def closed(request: pytest.FixtureRequest) -> Isolation:
    return request.param


def test_environment_holds_no_secrets(isolation: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEL_TEST_SECRET", "hunter2")
    outcome = python(
        """
        import os, glob
        print(sorted(os.environ))
        for path in glob.glob("/proc/[0-9]*/environ"):
            try:
                print("hunter2" in open(path).read(), path) if "hunter2" in open(path).read() else None
            except OSError:
                pass
        """,
        isolation,
    )
    assert "hunter2" not in outcome.stdout.decode() or isolation is Isolation.LIMITS
    assert outcome.stdout.decode().splitlines()[0] == "['HOME', 'LANG', 'PATH', 'TMPDIR']"
    assert isolation is Isolation.LIMITS or len(outcome.stdout.splitlines()) == 1


def test_home_and_run_files_cannot_be_read(closed: Isolation, tmp_path: Path) -> None:
    secret = tmp_path / "expected.json"
    secret.write_text("hunter2")
    tmp_path.chmod(0o777)
    secret.chmod(0o666)
    outcome = python(
        f"""
        import os
        for path in ({str(secret)!r}, "/etc/passwd", "/etc/shadow", "/root/.bashrc", {str(Path(__file__))!r}):
            try:
                print(open(path).read())
            except OSError as error:
                print("refused")
        for folder in ("/home", "/root", {str(tmp_path)!r}, {str(Path.home())!r}):
            try:
                names = [n for n in os.listdir(folder) if n not in (".pyenv", ".rustup")]
                print("refused" if not names else names)
            except OSError:
                print("refused")
        try:
            open({str(tmp_path / "planted")!r}, "w")
        except OSError:
            print("refused")
        """,
        closed,
    )
    assert outcome.stdout.decode().split() == ["refused"] * 10
    assert not (tmp_path / "planted").exists()


def test_links_do_not_lead_out(closed: Isolation, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    secret.chmod(0o666)
    outcome = python(
        f"""
        import os
        os.symlink({str(secret)!r}, "link")
        os.symlink("../" * 20 + {str(secret)!r}[1:], "up")
        for attempt in (
            lambda: open("link").read(),
            lambda: open("up").read(),
            lambda: open("/proc/1/root" + {str(secret)!r}).read(),
            lambda: open("/proc/self/root" + {str(secret)!r}).read(),
            lambda: os.link({str(secret)!r}, "hard"),
            lambda: (os.chroot("."), open("/secret").read()),
            lambda: open("/dev/fd/../../../.." + {str(secret)!r}).read(),
        ):
            try:
                print(attempt())
            except OSError:
                print("refused")
        """,
        closed,
    )
    assert outcome.stdout.decode().split() == ["refused"] * 7


def test_system_and_interpreter_cannot_be_written(closed: Isolation) -> None:
    outcome = python(
        """
        import os
        for path in ("/usr/bin/x", "/x", os.__file__, "/dev/x", "/proc/sys/kernel/hostname"):
            try:
                open(path, "w")
                print("wrote", path)
            except OSError:
                print("refused")
        """,
        closed,
    )
    assert outcome.stdout.decode().split() == ["refused"] * 5


def test_no_network_not_even_loopback(isolation: Isolation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        outcome = python(
            f"""
            import socket
            for kind, address in (
                (socket.AF_INET, ("127.0.0.1", {server.getsockname()[1]})),
                (socket.AF_UNIX, "\\0keel-test-abstract"),
            ):
                try:
                    with socket.socket(kind) as s:
                        s.settimeout(1)
                        s.connect(address)
                    print("connected")
                except OSError:
                    print("refused")
            """,
            isolation,
        )
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()
    assert outcome.stdout.decode().split() == ["refused"] * 2


def test_abstract_sockets_of_others_cannot_be_reached(isolation: Isolation) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0keel-test-listening")
        server.listen()
        source = r"import socket; socket.socket(socket.AF_UNIX).connect('\0keel-test-listening')"
        outcome = python(source, isolation)
    assert outcome.exit_code == 1 and b"Error" in outcome.stderr


def test_signals_do_not_reach_others(isolation: Isolation) -> None:
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        outcome = python(
            f"""
            import os, resource
            for pid in ({os.getpid()}, {victim.pid}):
                for attempt in (
                    lambda: os.kill(pid, 9 if pid == {victim.pid} else 0),
                    lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0)),
                    lambda: os.sched_setaffinity(pid, [0]),
                ):
                    try:
                        attempt()
                        print("reached")
                    except OSError:
                        print("refused")
            try:
                os.kill(-1, 9)
            except OSError:
                pass
            """,
            isolation,
        )
        assert outcome.stdout.decode().split() == ["refused"] * 6
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_the_supervisor_cannot_be_killed_or_traced(isolation: Isolation) -> None:
    outcome = python(
        """
        import os, ctypes
        for attempt in (
            lambda: os.kill(os.getppid(), 9),
            lambda: open(f"/proc/{os.getppid()}/mem", "r+b"),
            lambda: os.readlink(f"/proc/{os.getppid()}/fd/0"),
            lambda: os.readlink(f"/proc/{os.getppid()}/exe"),
        ):
            try:
                attempt()
            except OSError:
                print("refused")
        print(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0))
        """
        if _has_ctypes()
        else "print('refused\\n' * 4 + '-1')",
        isolation,
    )
    lines = outcome.stdout.decode().split()
    if isolation is Isolation.NAMESPACES:  # the kernel takes a signal to PID 1 and does not deliver it
        lines = ["refused", *lines] if len(lines) == 4 else lines
    assert lines == ["refused"] * 4 + ["-1"]


def _has_ctypes() -> bool:
    return sandbox.run({}, [Command((PYTHON, "-I", "-S", "-c", "import ctypes"))])[0].succeeded


def test_new_namespaces_and_mounts_are_refused(isolation: Isolation) -> None:
    outcome = python(
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.unshare(0x10000000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.setns(0, 0))
        """,
        isolation,
    )
    assert outcome.stdout.decode().split() == ["-1"] * 3
