"""System calls that Python 3.11 has no name for: namespaces, mounts, Landlock, capabilities. Linux only, ctypes only.

Runs inside the jail's launcher, so it imports the standard library alone. Every function raises `OSError` with the
kernel's errno; deciding what a refusal means is the caller's business.
"""

from __future__ import annotations

import ctypes
import os
import struct

TYPE_CHECKING = False  # as `typing` has it; importing that, and what it imports, is a quarter of the launcher's time
if TYPE_CHECKING:
    from collections.abc import Iterable

SIGKILL, SIGPIPE, SIGSTOP, SIGXCPU, SIGXFSZ = 9, 13, 19, 24, 25

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20, 0x1000, 0x4000, 0x40000

_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_READ_ONLY, _ATTR_NO_SUID, _ATTR_NO_DEV = 0x1, 0x2, 0x4
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_CAPABILITY_VERSION_3 = 0x20080522
# These numbers are the same on x86-64 and aarch64.
_SYS_MOUNT_SETATTR, _SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_LIBC = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int = 0, pointer: object = 0) -> None:
    """`prctl(2)`; integers are passed as unsigned longs, which variadic calls need."""
    third = ctypes.c_ulong(pointer) if isinstance(pointer, int) else pointer
    zero = ctypes.c_ulong(0)
    _check(_LIBC.prctl(ctypes.c_int(option), ctypes.c_ulong(value), third, zero, zero), f"prctl {option}")


def die_with_parent() -> None:
    """The kernel kills this process when the thread that started it ends. Cleared by a change of user id."""
    prctl(_PR_SET_PDEATHSIG, SIGKILL)


def restore_signals() -> None:
    """Undoes what Python ignores, because that is inherited."""
    for number in (SIGPIPE, SIGXFSZ):
        _LIBC.signal(ctypes.c_int(number), ctypes.c_void_p(0))


def hide_from_debuggers() -> None:
    """No process of the same user may trace this one or read its memory."""
    prctl(_PR_SET_DUMPABLE, 0)


def adopt_orphans() -> None:
    """Descendants that lose their parent become children of this process, not of init."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def refuse_new_privileges() -> None:
    """Set-user-id programs give nothing from here on; Landlock and seccomp ask for this."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_bounding_set() -> None:
    """No later `execve` can gain a capability, not even as user 0."""
    for capability in range(64):
        try:
            prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # past the last capability, or no right to drop: `drop_capabilities` is what counts then
            return


def drop_capabilities() -> None:
    """Empties the effective, permitted and inheritable sets."""
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _check(_LIBC.capset(header, struct.pack("6I", 0, 0, 0, 0, 0, 0)), "capset")


def unshare(flags: int) -> None:
    """Leaves the named namespaces (`CLONE_NEW*`) for new ones."""
    _check(_LIBC.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """`mount(2)`."""
    arguments = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _check(_LIBC.mount(*arguments), f"mount {source} on {target}")


def bind_read_only(source: str, target: str) -> None:
    """Shows `source` with everything mounted below it at `target`, read-only, without devices or set-user-id."""
    mount(source, target, "", MS_BIND | MS_REC)
    attributes = struct.pack("4Q", _ATTR_READ_ONLY | _ATTR_NO_SUID | _ATTR_NO_DEV, 0, 0, 0)
    arguments = (_AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes)))
    _check(_LIBC.syscall(ctypes.c_long(_SYS_MOUNT_SETATTR), *arguments), f"mount_setattr {target}")


def pivot_root(root: str) -> None:
    """Makes `root` the root directory and lets go of the old one, which becomes unreachable."""
    os.chdir(root)
    number = ctypes.c_long(_SYS_PIVOT_ROOT[os.uname().machine])
    _check(_LIBC.syscall(number, b".", b"."), "pivot_root")
    _check(_LIBC.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")


# Landlock (https://docs.kernel.org/userspace-api/landlock.html). File rights by the ABI that brought them.
_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read file, read directory
_FILE_WRITE = 1 << 1 | 1 << 2
_FILE_ONLY = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14
_RIGHTS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
_RIGHTS_BITS_NOW = 16
_TCP_ABI, _SCOPE_ABI = 4, 6
SIGNAL_SCOPE_ABI = _SCOPE_ABI
"""From this Landlock ABI on, signals cannot leave the domain."""


def landlock_abi() -> int:
    """The kernel's Landlock ABI; 0 = none."""
    create = ctypes.c_long(_SYS_LANDLOCK_CREATE)
    return max(0, _LIBC.syscall(create, None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def landlock(readable: Iterable[str], writable: Iterable[str], devices: Iterable[str]) -> None:
    """From here on this process and its children reach only these paths: below `readable` to read and execute, below
    `writable` everything, `devices` to read and write. TCP is refused from ABI 4 on; signals and abstract sockets
    outside the domain from ABI 6 on. Needs `refuse_new_privileges`."""
    abi = landlock_abi()
    everything = (1 << _RIGHTS_BITS.get(abi, _RIGHTS_BITS_NOW)) - 1
    fields = [everything] + [0b11] * (abi >= _TCP_ABI) + [0b11] * (abi >= _SCOPE_ABI)
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    create = ctypes.c_long(_SYS_LANDLOCK_CREATE)
    size = ctypes.c_size_t(len(attributes))
    ruleset = _check(_LIBC.syscall(create, attributes, size, ctypes.c_uint(0)), "landlock_create_ruleset")
    for paths, rights in ((readable, _READ), (writable, everything), (devices, _FILE_WRITE)):
        for path in paths:
            _allow(ruleset, path, rights & everything)
    restrict = ctypes.c_long(_SYS_LANDLOCK_RESTRICT)
    _check(_LIBC.syscall(restrict, ctypes.c_int(ruleset), ctypes.c_uint(0)), "landlock_restrict_self")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    if not os.path.exists(path):
        return
    if not os.path.isdir(path):
        rights &= _FILE_ONLY
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, opened)
    add = ctypes.c_long(_SYS_LANDLOCK_ADD)
    _check(_LIBC.syscall(add, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0)), f"landlock {path}")
    os.close(opened)
