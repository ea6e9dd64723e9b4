"""What a process does to itself before it touches what others wrote.

Standard library only and no imports of ours: the same text also runs inside the box of
code submissions, on an interpreter that sees nothing else.
"""

from __future__ import annotations

import ctypes
import os
import struct

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_PR_CAPBSET_DROP, _PR_SET_KEEPCAPS = 24, 8
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_SIGKILL = 9


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def check(result: int) -> int:
    """The result of a call into libc; raises OSError when it is negative."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def die_with_parent() -> None:
    """Be killed when the thread that forked this process ends."""
    check(libc().prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0))


def drop_capabilities(keep: int = 0) -> None:
    """Give up every capability but those in `keep` (a bit mask below 2**32)."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    sets = struct.pack("=6I", keep, keep, 0, 0, 0, 0)
    check(libc().capset(header, sets))


def install_filter(program: bytes) -> None:
    """Put a seccomp filter (an array of `struct sock_filter`) in force, for good."""
    code = ctypes.create_string_buffer(program, len(program))
    descriptor = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(code))
    c = libc()
    check(c.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    check(c.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, descriptor, 0, 0))
