"""A seccomp filter: system calls that a tested program has no business with fail with EPERM.

Runs inside the jail's launcher (standard library only). The filter looks at call numbers and plain integer arguments;
it cannot see paths. `clone3` answers ENOSYS because its flags lie in memory: C libraries then use `clone`, whose flags
are checked. Calls of another architecture's numbering kill the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from rewards.sandbox.kernel import prctl

# name -> (x86-64, aarch64)
_REFUSED = {
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "quotactl": (179, 60),
    # Memory that no resource limit and no process's resident set counts.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "mlock": (149, 228),
    "mlockall": (151, 230),
}
# Allowed on the caller itself (first argument 0): on others of the same user they could throttle or kill.
_SELF_ONLY = {
    "prlimit64": (302, 261),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
}
_SOCKET = {"socket": (41, 198)}
_SIGNALS = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
}
_FORKS_X86 = (57, 58)
_THREAD_FLAG = 0x10000
_CLONE, _CLONE3 = (56, 220), (435, 435)
_NAMESPACE_FLAGS = 0x7E020000  # every CLONE_NEW* that clone takes

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32_BIT = 0x40000000

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NUMBER_OFFSET, _ARCH_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 4, 16
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def available() -> bool:
    """Whether the filter knows this machine's call numbers."""
    return os.uname().machine in _ARCHITECTURES


def build(*, sockets: bool, signals: bool, processes: bool) -> bytes:
    """The filter as an array of BPF instructions.

    Args:
        sockets: let `socket` through (in a network namespace of its own a program reaches nothing with it).
        signals: let `kill` and its kin through (in a PID namespace of its own, or a Landlock signal scope).
        processes: let a program start others (where a limit on processes holds); threads are always allowed.
    """
    column, architecture = _ARCHITECTURES[os.uname().machine]
    refused = [*_REFUSED.values(), *([] if sockets else _SOCKET.values()), *([] if signals else _SIGNALS.values())]
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH_OFFSET),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        (_JUMP_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL),
        *_refuse(_CLONE3[column], errno.ENOSYS),
    ]
    for numbers in refused:
        program += _refuse(numbers[column], errno.EPERM)
    program += _refuse_if(_CLONE[column], (_JUMP_ANY_BIT, 0, 1, _NAMESPACE_FLAGS))
    if not processes:
        program += _refuse_if(_CLONE[column], (_JUMP_ANY_BIT, 1, 0, _THREAD_FLAG))
        for number in _FORKS_X86 if column == 0 else ():
            program += _refuse(number, errno.EPERM)
    for numbers in _SELF_ONLY.values():
        program += _refuse_if(numbers[column], (_JUMP_EQUAL, 1, 0, 0))
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _refuse(number: int, error: int) -> list[_Instruction]:
    return [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, 0x50000 | error)]


def _refuse_if(number: int, test: _Instruction) -> list[_Instruction]:
    """Refuses the call when `test` on its first argument falls through; loads the call number again afterwards."""
    return [
        (_JUMP_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_OFFSET),
        test,
        (_RETURN, 0, 0, 0x50000 | errno.EPERM),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
    ]


def install(program: bytes) -> None:
    """Binds this process and all it starts to the filter. Needs `refuse_new_privileges`."""
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.c_char_p(header))
