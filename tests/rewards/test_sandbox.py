"""The jail does what it is asked, and nothing in it outgrows its limits or outlives it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rewards.sandbox import run as sandbox
from rewards.sandbox.run import PACKAGE_ROOT, PYTHON, Cause, Command, Isolation, Limits
from tests.rewards.jailed import CLOSED, REACHABLE, WORKING, assert_none_left, processes_with, python


@pytest.fixture(params=WORKING)
def isolation(request: pytest.FixtureRequest) -> Isolation:
    return request.param


@pytest.fixture(params=CLOSED)
def closed(request: pytest.FixtureRequest) -> Isolation:
    return request.param


def test_this_machine_has_a_strong_isolation() -> None:
    report = sandbox.isolation_report()
    assert sandbox.strongest_isolation() in WORKING
    assert all(report[kind] == "" for kind in WORKING)
    if not WORKING or WORKING == [Isolation.LIMITS]:
        pytest.skip(f"neither namespaces nor Landlock here: {report}")


def test_order_of_strength() -> None:
    assert Isolation.NAMESPACES.at_least(Isolation.LANDLOCK) and Isolation.LIMITS.at_least(Isolation.LIMITS)
    assert not Isolation.LIMITS.at_least(Isolation.LANDLOCK)


def test_output_exit_code_and_input(isolation: Isolation) -> None:
    source = "import sys; print(input()[::-1]); print('e', file=sys.stderr); sys.exit(3)"
    outcome = python(source, isolation, stdin="abc\n")
    assert (outcome.cause, outcome.exit_code, outcome.stdout, outcome.stderr) == (Cause.EXIT, 3, b"cba\n", b"e\n")
    assert not outcome.succeeded


def test_files_are_shared_by_commands_and_gone_afterwards(isolation: Isolation) -> None:
    write = Command(
        (PYTHON, "-I", "-S", "-c", "import os; print(os.getcwd()); open('b','w').write(2*open('a').read())")
    )
    read = Command((PYTHON, "-I", "-S", "-c", "print(open('b').read())"))
    first, second = sandbox.run({"a": "xy"}, [write, read], isolation=isolation)
    assert second.stdout == b"xyxy\n"
    folder = first.stdout.decode().strip()
    assert folder == "/tmp" or not Path(folder).exists()


def test_what_is_readable_may_lie_below_the_programs_own_tmp(closed: Isolation) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        for name in ("shown", "hidden"):
            (Path(folder) / name).write_text(name)
        os.chmod(folder, 0o755)
        program = f"""
import os
print(open({folder + "/shown"!r}).read())
try:
    print(open({folder + "/hidden"!r}).read())
except OSError as error:
    print(type(error).__name__)
open("own", "w").write("x")
print(os.path.exists("own"))
"""
        command = Command((REACHABLE, "-I", "-S", "-c", program))
        (outcome,) = sandbox.run({}, [command], readable=[f"{folder}/shown"], isolation=closed)
    assert outcome.stdout.split()[0] == b"shown" and outcome.stdout.split()[1] != b"hidden", outcome
    assert outcome.stdout.split()[2] == b"True"


def test_a_failed_command_stops_the_rest(isolation: Isolation) -> None:
    fails = Command((PYTHON, "-I", "-S", "-c", "1/0"), must_succeed=True)
    assert len(sandbox.run({}, [fails, fails], isolation=isolation)) == 1


def test_a_missing_program_is_the_callers_mistake(isolation: Isolation) -> None:
    with pytest.raises(sandbox.SandboxError, match=r"/no/such cannot be started.*FileNotFoundError"):
        sandbox.run({}, [Command(("/no/such",))], isolation=isolation)


def test_endless_loop_ends_at_the_limit(isolation: Isolation) -> None:
    started = time.monotonic()
    outcome = python("while True: pass", isolation, Limits(seconds=0.5))
    assert outcome.cause is Cause.TIMEOUT and not outcome.succeeded
    assert time.monotonic() - started < 5


def test_sleep_that_ignores_signals_ends_at_the_limit(isolation: Isolation) -> None:
    source = "import signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)"
    assert python(source, isolation, Limits(seconds=0.4)).cause is Cause.TIMEOUT


def test_fork_bomb(isolation: Isolation) -> None:
    source = """
    import os, time
    mark = "keel-fork-bomb"
    end = time.monotonic() + 3
    while time.monotonic() < end:
        try:
            os.fork()
        except OSError:
            time.sleep(0.01)
    """
    outcome = python(source, isolation, Limits(seconds=1.0, processes=12, memory_bytes=512 << 20))
    assert outcome.cause in (Cause.TIMEOUT, Cause.PROCESSES, Cause.MEMORY)
    assert_none_left("keel-fork-bomb")


def test_number_of_processes_is_limited(closed: Isolation) -> None:
    source = """
    import os, time
    count = 0
    try:
        while count < 200:
            if os.fork() == 0:
                time.sleep(10)
            count += 1
    except OSError:
        pass
    print(count)
    """
    outcome = python(source, closed, Limits(seconds=3.0, processes=8))
    assert outcome.cause is Cause.PROCESSES or int(outcome.stdout) <= 8


def test_memory_bomb_in_one_process(isolation: Isolation) -> None:
    outcome = python("x = bytearray(400 << 20); print(len(x))", isolation)
    assert outcome.exit_code == 1 and b"MemoryError" in outcome.stderr and not outcome.stdout


def test_memory_bomb_over_many_processes(isolation: Isolation) -> None:
    source = """
    import os, time
    for _ in range(6):
        if os.fork() == 0:
            x = b"x" * (60 << 20)
            time.sleep(10)
    time.sleep(10)
    """
    assert python(source, isolation).cause is Cause.MEMORY


def test_memory_that_no_process_holds_is_refused(isolation: Isolation) -> None:
    outcome = python("import os; os.memfd_create('x')", isolation)
    assert b"PermissionError" in outcome.stderr


def test_infinite_output(isolation: Isolation) -> None:
    outcome = python("while True: print('x' * 1000)", isolation)
    assert outcome.cause is Cause.OUTPUT and len(outcome.stdout) < 1 << 18


def test_big_files_are_cut_short(isolation: Isolation) -> None:
    outcome = python("open('big', 'wb').write(bytes(64 << 20))", isolation, Limits(file_bytes=1 << 20))
    assert b"File too large" in outcome.stderr


def test_disk_is_limited_in_total() -> None:
    if Isolation.NAMESPACES not in WORKING:
        pytest.skip("the limit on space needs namespaces")
    source = "for i in range(40): open(str(i), 'wb').write(bytes(8 << 20))"
    assert b"No space left" in python(source, Isolation.NAMESPACES).stderr


def test_daemons_die_with_the_command(isolation: Isolation) -> None:
    source = """
    import os, time
    "keel-daemon-test"
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.close(1)
            time.sleep(60)
        os._exit(0)
    time.sleep(0.2)
    print("left")
    """
    outcome = python(source, isolation)
    assert outcome.succeeded and outcome.stdout == b"left\n" and outcome.seconds < 3
    assert_none_left("keel-daemon-test")


def test_a_daemon_that_holds_the_output_open_does_not_hold_the_grader(isolation: Isolation) -> None:
    source = "import os, time\n'keel-holder-test'\nif os.fork() == 0:\n    os.setsid(); time.sleep(60)\nprint('done')"
    outcome = python(source, isolation)
    assert outcome.succeeded and outcome.stdout == b"done\n" and outcome.seconds < 3
    assert_none_left("keel-holder-test")


def test_everything_dies_when_whoever_asked_is_killed(isolation: Isolation, tmp_path: Path) -> None:
    # Without namespaces, what was forked lives on until its CPU time is used up: see the package's docstring.
    fork, count = ("os.fork()", 2) if isolation is Isolation.NAMESPACES else ("os", 1)
    script = f"""
import sys
sys.path.insert(0, {PACKAGE_ROOT!r})
from rewards.sandbox.run import *
source = "import os, time; " + repr("keel-" + "orphan-test") + "; {fork}; time.sleep(60)"
command = Command((PYTHON, "-I", "-S", "-c", source), limits=Limits(seconds=60))
run({{}}, [command], isolation=Isolation({isolation.value!r}))
"""
    asker = subprocess.Popen([sys.executable, "-c", script], env={"TMPDIR": str(tmp_path)})
    try:
        deadline = time.monotonic() + 20
        while len(processes_with("keel-orphan-test")) < count:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        asker.kill()
        asker.wait()
    assert_none_left("keel-orphan-test")


def test_without_privileges(tmp_path: Path) -> None:
    """The same as an ordinary user, through a user namespace."""
    system_python = shutil.which("python3", path="/usr/bin")
    if os.getuid() != 0 or system_python is None:
        pytest.skip("needs root, to become somebody else, and a system Python")
    script = f"""
import sys
sys.path.insert(0, {PACKAGE_ROOT!r})
from rewards.sandbox.run import *
report = isolation_report()
print(*[kind for kind, refusal in report.items() if not refusal])
source = "import os; print(os.getpid() < 9, os.listdir('/tmp'), os.path.exists('/home'))"
command = Command((PYTHON, "-I", "-S", "-c", source))
for kind in report:
    if not report[kind] and kind is Isolation.NAMESPACES:
        print(run({{}}, [command], isolation=kind)[0].stdout)
"""
    answer = subprocess.run(
        [system_python, "-B", "-c", script], user=65534, group=65534, extra_groups=[], cwd="/",
        capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin"},
    )  # fmt: skip
    if "Permission denied" in answer.stderr:
        pytest.skip("the repository cannot be read by others")
    assert answer.returncode == 0, answer.stderr
    kinds = answer.stdout.splitlines()[0].split()
    assert "landlock" in kinds or "namespaces" in kinds
    if "namespaces" in kinds:
        assert r"True [] False" in answer.stdout


def test_no_processes_where_the_kernel_cannot_limit_them() -> None:
    """Root's interpreter in root's home, no namespaces: the user stays 0, so forks are refused, threads are not."""
    if os.getuid() != 0 or PYTHON.startswith("/usr/") or Isolation.LANDLOCK not in WORKING:
        pytest.skip("needs root, an interpreter that others cannot reach, and Landlock")
    source = """
import os, subprocess, threading
print(os.getuid())
for attempt in (os.fork, lambda: subprocess.run(["/bin/true"])):
    try:
        attempt()
    except PermissionError:
        print("refused")
thread = threading.Thread(target=print, args=("thread",))
thread.start()
thread.join()
"""
    outcome = sandbox.run({}, [Command((PYTHON, "-I", "-S", "-c", source))], isolation=Isolation.LANDLOCK)[0]
    assert outcome.stdout.split() in ([b"0", b"refused", b"refused", b"thread"], [b"refused"])
