"""Which files a confined process may see: Landlock.

Source: Linux Documentation/userspace-api/landlock.rst. Everything not listed is refused,
for this process and all it starts, without privileges. Here nothing may ever be written;
network and signals beyond the process are refused where the kernel's Landlock knows them
(seccomp refuses them anyway).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from prorl_nemo.rewards.sandbox.inside import check, libc

# linux/landlock.h; the three system calls have these numbers on every machine.
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
# Rights on files that each version of the interface handles: 13, then refer, truncate, ioctl.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_PR_SET_NO_NEW_PRIVS = 38


def version() -> int:
    """Version of the kernel's Landlock interface; 0 where it is absent or switched off."""
    found = int(libc().syscall(_CREATE, None, ctypes.c_size_t(0), 1))
    return max(0, found)


def restrict_to(readable: Iterable[str], executable: Iterable[str] = ()) -> None:
    """Let this process read only below `readable`, and read and execute below `executable`.

    Paths that do not exist are passed over. Irrevocable; sets no-new-privileges.

    Raises:
        OSError: the kernel has no Landlock, or refuses.
    """
    interface = version()
    if interface == 0:
        raise OSError("Landlock is not available")
    files = (1 << _FILE_RIGHTS[min(interface, 5)]) - 1
    network = 0b11 if interface >= 4 else 0
    scopes = 0b11 if interface >= 6 else 0
    attributes = struct.pack("=QQQ", files, network, scopes)
    size = 24 if interface >= 6 else 16 if interface >= 4 else 8
    ruleset = check(libc().syscall(_CREATE, attributes, ctypes.c_size_t(size), 0))
    try:
        for path in readable:
            _allow(ruleset, path, _READ_FILE | _READ_DIR)
        for path in executable:
            _allow(ruleset, path, _READ_FILE | _READ_DIR | _EXECUTE)
        check(libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        check(libc().syscall(_RESTRICT, ruleset, 0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            rights &= ~_READ_DIR
        rule = struct.pack("=Qi", rights, parent)
        check(libc().syscall(_ADD_RULE, ruleset, 1, rule, 0))
    finally:
        os.close(parent)
