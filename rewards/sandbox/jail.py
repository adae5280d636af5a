"""The launcher: a small process that builds the jail, runs commands in it one after the other, and reports.

Runs as `python -I -S` with the standard library alone, and little of that. One marshalled object comes in on stdin (see
`run.Jail`), one per command goes out on stdout. With namespaces, three processes: this one, the jail's
init (PID 1, which supervises) and the tested program. Without, this process supervises as the subreaper of everything
it starts.
"""

from __future__ import annotations

import marshal
import os
import resource
import sys

from rewards.sandbox import kernel, seccomp, supervise

TYPE_CHECKING = False  # as `typing` has it; see `kernel`
if TYPE_CHECKING:
    from typing import Any

_SYSTEM_PATHS = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64"),
    *("/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d"),
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
_NOBODY = 65534
_MANY_DESCRIPTORS = 4096
_FAR_USER = 1_500_000_000
"""A process id added to this is a user id that nothing else on the machine has, so its process limit is its own."""
_NEAR_USER, _NEAR_USERS = 60_000, 5_000
"""The same inside a container that maps only the first 65,536 ids; two jails may share one there."""


def main() -> None:
    """Entry point."""
    kernel.die_with_parent()
    spec = marshal.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    spec["readable"] = [*_system_paths(), *spec["readable"]]
    if spec["isolation"] == "namespaces":
        _with_namespaces(spec, report)
    else:
        kernel.hide_from_debuggers()
        kernel.adopt_orphans()
        user = _own_user(spec)
        _write_files(spec["root"], spec["files"], user)
        _serve(spec, report, user, spec["root"])


def _system_paths() -> list[str]:
    java = [f"/etc/{name}" for name in os.listdir("/etc") if name.startswith("java-")]
    return [path for path in (*_SYSTEM_PATHS, *java) if os.path.exists(path)]


def _serve(spec: dict[str, Any], report: int, user: int | None, work: str) -> None:
    for command in spec["commands"]:
        outcome = supervise.run(command, lambda command=command: _enter(spec, command, user, work), spec["isolation"])
        _write_all(report, marshal.dumps(outcome))
        if command["must_succeed"] and outcome["exit_code"] != 0:
            return


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _with_namespaces(spec: dict[str, Any], report: int) -> None:
    user = _new_namespaces()
    init = os.fork()
    if init:
        os.closerange(3, _MANY_DESCRIPTORS)  # so that end-of-file reaches whoever reads from the program
        os._exit(os.waitstatus_to_exitcode(os.waitpid(init, 0)[1]) & 0xFF)
    kernel.die_with_parent()
    kernel.hide_from_debuggers()
    _build_root(spec, user)
    _serve(spec, report, user, "/tmp")
    os._exit(0)


def _new_namespaces() -> int | None:
    """Returns the user id that programs shall run as, None for the one this process already has."""
    if os.getuid() == 0:
        try:
            kernel.unshare(_NAMESPACES)
            return _free_user()
        except PermissionError:  # root of a container without the right to mount: try as anybody else would
            pass
    outside_user, outside_group = os.getuid(), os.getgid()
    kernel.unshare(_NAMESPACES | kernel.CLONE_NEWUSER)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{_NOBODY} {outside_user} 1")
    _write("/proc/self/gid_map", f"{_NOBODY} {outside_group} 1")
    return None


def _free_user() -> int:
    with open("/proc/self/uid_map") as file:
        mapped = sum(int(line.split()[2]) for line in file)
    return _FAR_USER + os.getpid() if mapped > 2 * _FAR_USER else _NEAR_USER + os.getpid() % _NEAR_USERS


def _own_user(spec: dict[str, Any]) -> int | None:
    """Without namespaces: another user id, if this process may change it and the commands stay reachable."""
    if os.getuid() != 0:
        return None
    for path in (*(command["argv"][0] for command in spec["commands"]), spec["root"]):
        while path.startswith("/") and path != "/":
            path = os.path.dirname(path)
            if os.path.exists(path) and not os.stat(path).st_mode & 0o001:
                return None
    return _free_user()


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _build_root(spec: dict[str, Any], user: int | None) -> None:
    """A root directory in memory: what is `readable`, read-only; /dev, /proc, and a /tmp of limited size."""
    root = spec["root"]
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    os.mkdir(root + "/tmp")
    kernel.mount("tmpfs", root + "/tmp", "tmpfs", flags, f"size={spec['disk_bytes']},nr_inodes=8192,mode=700")
    for path in spec["readable"]:  # some of it may lie below /tmp
        _show(path, root)
    for path in _DEVICES:
        os.makedirs(root + "/dev", exist_ok=True)
        _write(root + path, "")
        kernel.mount(path, root + path, "", kernel.MS_BIND)
    os.symlink("/proc/self/fd", root + "/dev/fd")
    for folder in ("/proc", "/dev/shm"):
        os.mkdir(root + folder)
    # Before the old root goes: without privileges, /proc may be mounted only where one is in view already.
    kernel.mount("proc", root + "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    kernel.pivot_root(root)
    kernel.mount("tmpfs", "/dev/shm", "tmpfs", flags | kernel.MS_NOEXEC, "size=16m,nr_inodes=256,mode=1777")
    if user is not None:
        os.chown("/tmp", user, user)
    _write_files("/tmp", spec["files"], user)
    kernel.mount("none", "/", "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | flags)


def _show(path: str, root: str) -> None:
    if os.path.lexists(root + path):  # lies below one that is there already
        return
    os.makedirs(os.path.dirname(root + path), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), root + path)
        return
    if os.path.isdir(path):
        os.mkdir(root + path)
    else:
        _write(root + path, "")
    kernel.bind_read_only(path, root + path)


def _write_files(folder: str, files: dict[str, str], user: int | None) -> None:
    if user is not None:
        os.chown(folder, user, user)
    for name, text in files.items():
        path = os.path.join(folder, name)
        with open(path, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            file.write(text)
        if user is not None:
            os.chown(path, user, user)


def _enter(spec: dict[str, Any], command: dict[str, Any], user: int | None, work: str) -> None:
    """In the forked child, just before `execve`: limits, then rights, each given up for good."""
    os.chdir(work)
    os.umask(0o077)
    inside = spec["isolation"] == "namespaces"
    _set_limits(command, others=0 if inside or user is not None else _tasks_of(os.getuid()))
    kernel.drop_bounding_set()
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    kernel.drop_capabilities()
    kernel.refuse_new_privileges()
    kernel.die_with_parent()
    scoped = spec["isolation"] == "landlock" and kernel.landlock_abi() >= kernel.SIGNAL_SCOPE_ABI
    if spec["isolation"] == "landlock":
        kernel.landlock(spec["readable"], [work], _DEVICES)
    if seccomp.available():
        # The kernel does not limit user 0's processes; a compiler, which cannot do without them, is trusted that far.
        limited = user is not None or os.getuid() != 0 or command["must_succeed"]
        seccomp.install(seccomp.build(sockets=inside, signals=inside or scoped, processes=limited))
    elif not inside:
        raise OSError("no seccomp filter for this machine's system calls")


def _tasks_of(user: int) -> int:
    """Threads that a user runs already: outside a namespace the process limit counts them too."""
    count = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:  # it ended meanwhile
            continue
    return count


def _set_limits(command: dict[str, Any], *, others: int) -> None:
    cpu = int(command["seconds"]) + 1
    limits = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_DATA: command["memory_bytes"],
        resource.RLIMIT_NPROC: command["processes"] + others,
        resource.RLIMIT_NOFILE: command["open_files"],
        resource.RLIMIT_FSIZE: command["file_bytes"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_SIGPENDING: 1024,
    }
    if command["limit_address_space"]:
        limits[resource.RLIMIT_AS] = command["memory_bytes"]
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        soft, high = value if isinstance(value, tuple) else (value, value)
        if hard != resource.RLIM_INFINITY:
            soft, high = min(soft, hard), min(high, hard)
        resource.setrlimit(limit, (soft, high))
