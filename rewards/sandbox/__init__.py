"""A jail for hostile programs: `run.run` takes files and commands, and gives what each command printed.

What holds with `Isolation.NAMESPACES` (Linux with the right to make namespaces, as root or through a user namespace):

- Files: a root directory of its own in memory. Read-only: system directories (/usr, /lib, ...), the interpreter, the
  paths named in `readable`. Writable: /tmp and /dev/shm, limited in size, gone with the jail. Nothing else exists: no
  home, no run folder, no sockets of other services. Symbolic links and `..` cannot lead out.
- Processes: a PID namespace (other processes cannot be seen or signalled), a session of its own; everything in it,
  daemons included, is killed when the command ends, at its time limit, and when the process that asked for it dies.
- Network: a network namespace without any interface, loopback included. IPC and host name: namespaces of their own.
- Rights: a user id of its own or that of nobody, no capabilities, no new privileges, and a seccomp filter against
  namespaces, mounts, tracing, BPF, io_uring, keys, and memory that no limit counts.
- Limits: wall clock, CPU, data and address space per process, resident memory and processes in total (looked at every
  20 ms), threads, open files, file size, space in /tmp, output. An environment of four fixed variables.

`Isolation.LANDLOCK` (no namespaces, as in most containers) keeps the limits, the filter, the rights and the killing.
Landlock takes the place of the private root: other files cannot be opened, but their names and sizes can be asked for.
Sockets of any kind are refused by the filter. Signals to others are refused by Landlock (ABI 6) or else by the filter.
/tmp is a private directory on disk, bounded per file and by open files, not in total. Daemons are found through their
parents and killed; they survive only if the supervisor itself is killed first. Where Keel runs as root with an
interpreter that only root can reach, programs stay user 0, without any capability, and cannot start processes at all,
because the kernel does not limit that user's.

`Isolation.LIMITS` (a kernel before 5.13 in a container) is the same without Landlock: every file that the user may read
can be read. Use it for programs that you trust.

Not covered anywhere: bugs of the kernel, time side channels, the CPU's shared caches, load on the memory bus and on the
page cache. Use a virtual machine where that matters.
"""
