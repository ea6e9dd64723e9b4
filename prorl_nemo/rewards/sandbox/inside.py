"""What a process gives up before it touches what others wrote: files, calls, privileges.

Standard library only and no imports of ours: the same file is also loaded inside the box of
code submissions, by an interpreter that sees nothing else of this project.

Sources: Linux Documentation/userspace-api/landlock.rst and seccomp_filter.rst, capabilities(7).
"""

from __future__ import annotations

import ctypes
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_SIGKILL = 9
CAP_DAC_READ_SEARCH = 1 << 2

# linux/landlock.h; the three system calls have these numbers on every machine.
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
# How many rights on files each version of the interface knows: refer, truncate, ioctl added.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
# Rights that a rule on a single file may carry: execute, write, read, truncate, ioctl.
_FILE_ONLY = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def die_with_parent() -> None:
    """Be killed when the thread that forked this process ends. Lost by a change of user."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0))


def drop_capabilities(keep: int = 0) -> None:
    """Give up every capability but those of the bit mask `keep` (numbers below 32)."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, struct.pack("=6I", keep, keep, 0, 0, 0, 0)))


def become(user: int, keep: int = 0) -> None:
    """Turn from root into the unprivileged user and group `user`, for good."""
    if keep:
        _check(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    drop_capabilities(keep)


def install_filter(program: bytes) -> None:
    """Put a seccomp filter (an array of `struct sock_filter`) in force, for good."""
    code = ctypes.create_string_buffer(program, len(program))
    descriptor = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(code))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, descriptor, 0, 0))


def landlock_version() -> int:
    """Version of the kernel's Landlock interface; 0 where it is absent or switched off."""
    return max(0, int(_libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1)))


def see_only(
    readable: Iterable[str], executable: Iterable[str] = (), writable: Iterable[str] = ()
) -> None:
    """Leave this process only these paths and what is below them, for good (Landlock).

    Paths that do not exist are passed over. Network and signals beyond the process are
    refused too where the kernel's Landlock knows them; seccomp refuses them anyway.

    Raises:
        OSError: the kernel has no Landlock, or refuses.
    """
    version = landlock_version()
    if version == 0:
        raise OSError("Landlock is not available")
    everything = (1 << _FILE_RIGHTS[min(version, 5)]) - 1
    network = 0b11 if version >= 4 else 0
    scopes = 0b11 if version >= 6 else 0
    attributes = struct.pack("=QQQ", everything, network, scopes)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _check(_libc.syscall(_CREATE, attributes, ctypes.c_size_t(size), 0))
    try:
        for path in readable:
            _allow(rules, path, _READ_FILE | _READ_DIR)
        for path in executable:
            _allow(rules, path, _READ_FILE | _READ_DIR | _EXECUTE)
        for path in writable:
            _allow(rules, path, everything)
        _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _check(_libc.syscall(_RESTRICT, rules, 0))
    finally:
        os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            rights &= _FILE_ONLY
        _check(_libc.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", rights, parent), 0))
    finally:
        os.close(parent)
