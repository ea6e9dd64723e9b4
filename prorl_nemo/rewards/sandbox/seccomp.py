"""Which system calls a confined process may make: a seccomp filter of allowed calls.

An allow list, because a list of forbidden calls misses those of the next kernel. What is
not listed fails with EPERM: no sockets, no new processes, no signals to others, no writing
or creating of files, no mounts, no namespaces, no ptrace. The filter is classic BPF
(Linux Documentation/userspace-api/seccomp_filter.rst), assembled here so that neither
libseccomp nor a compiler is needed.
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

from prorl_nemo.errors import UserError

# name: number on x86_64, number on aarch64 (None: the machine has no such call).
# fmt: off
_CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "stat": (4, None),
    "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "lseek": (8, 62),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216),
    "madvise": (28, 233), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61),
    "getcwd": (79, 17), "pipe": (22, None), "pipe2": (293, 59), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getgroups": (115, 158), "umask": (95, 166), "uname": (63, 160), "sysinfo": (99, 179),
    "times": (100, 153), "getrusage": (98, 165), "getrlimit": (97, 163),
    "gettimeofday": (96, 169), "time": (201, None), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "alarm": (37, None), "setitimer": (38, 103), "getitimer": (36, 102), "futex": (202, 98),
    "set_robust_list": (273, 99), "rseq": (334, 293), "set_tid_address": (218, 96),
    "arch_prctl": (158, None), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "membarrier": (324, 283), "getrandom": (318, 278), "exit": (60, 93),
    "exit_group": (231, 94), "restart_syscall": (219, 128), "fstatfs": (138, 44),
    "statfs": (137, 43),
    # Below: only with the arguments that _rules allows.
    "open": (2, None), "openat": (257, 56), "clone": (56, 220), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281),
    "fcntl": (72, 25), "ioctl": (16, 29), "prctl": (157, 167),
    "prlimit64": (302, 261),
}
# fmt: on
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_*

# O_WRONLY | O_RDWR | O_CREAT | O_TRUNC; O_TMPFILE and O_APPEND need one of them to write.
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000
_CLONE_THREAD = 0x10000

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _KILL_PROCESS = 0x7FFF0000, 0x80000000
_REFUSE, _ABSENT = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS


@dataclass(frozen=True)
class _Rule:
    """Allow a call if (argument & mask) is one of `values`."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF


def _rules() -> dict[str, _Rule]:
    return {
        "open": _Rule(1, (0,), _WRITING),
        "openat": _Rule(2, (0,), _WRITING),
        "clone": _Rule(0, (_CLONE_THREAD,), _CLONE_THREAD),
        # No F_SETOWN or F_SETSIG: with them a pipe sends signals to any process.
        "fcntl": _Rule(1, (0, 1, 2, 3, 4, 1030, 1032)),
        # Is it a terminal, how much is there to read, close on exec; no TIOCSTI.
        "ioctl": _Rule(1, (0x5401, 0x541B, 0x5450, 0x5451, 0x5413)),
        # PR_SET_NAME, PR_GET_NAME; not PR_SET_PDEATHSIG, by which a process outlives us.
        "prctl": _Rule(0, (15, 16)),
        "prlimit64": _Rule(0, (0,)),  # the process's own limits only
    }


def build(*, threads: bool, programs: bool) -> bytes:
    """Assemble the filter for this machine.

    Args:
        threads: may start threads (never processes).
        programs: may call execve; the filter stays in force.

    Returns:
        The array of `struct sock_filter`, for `inside.install_filter`.

    Raises:
        UserError: a machine other than x86_64 and aarch64.
    """
    machine = platform.machine()
    if machine not in _MACHINES:
        raise UserError(f"sandbox: no system call table for {machine}; use x86_64 or aarch64")
    column, architecture = _MACHINES[machine]
    rules = _rules()
    code = [
        (_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        # The x32 calls have the same numbers with this bit set.
        (_JUMP_GREATER_EQUAL, 0, 1, 0x40000000),
        (_RETURN, 0, 0, _ABSENT),
    ]
    for name, numbers in _CALLS.items():
        number = numbers[column]
        if number is None or (name.startswith("execve") and not programs):
            continue
        if name == "clone3":
            # libc falls back to clone, whose flags a filter can see, only on ENOSYS.
            body = [(_RETURN, 0, 0, _ABSENT)]
        elif name == "clone" and not threads:
            continue
        elif name in rules:
            body = _checked(rules[name])
        else:
            body = [(_RETURN, 0, 0, _ALLOW)]
        code.append((_JUMP_EQUAL, 0, len(body), number))
        code += body
    code.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _checked(rule: _Rule) -> list[tuple[int, int, int, int]]:
    body = [(_LOAD, 0, 0, 16 + 8 * rule.argument), (_AND, 0, 0, rule.mask)]
    for value in rule.values:
        body += [(_JUMP_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*body, (_RETURN, 0, 0, _REFUSE)]
