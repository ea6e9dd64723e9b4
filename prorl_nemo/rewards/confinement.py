"""The confinement of a worker that grades by computing: it can do nothing but compute.

After `enter` the process can read the interpreter, its packages and this one, and cannot
write a file, open a socket, start a process or a thread, or signal anyone. So even a
grader that were tricked into running code could only spoil its own verdict.
"""

from __future__ import annotations

import os
import sys

from prorl_nemo.rewards.sandbox import inside, seccomp

_active = False


def active() -> bool:
    """Whether this process is confined."""
    return _active


def enter() -> None:
    """Confine this process for good.

    Raises:
        OSError: the kernel refuses seccomp filters.
        UserError: no system call table for this machine.
    """
    global _active
    inside.drop_capabilities()
    # Without Landlock files stay readable; seccomp still keeps everything else away.
    if inside.landlock_version() > 0:
        inside.see_only(_readable())
    inside.install_filter(seccomp.build(threads=False, programs=False))
    _active = True


def _readable() -> list[str]:
    ours = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    imported = [path for path in sys.path if os.path.isdir(path) and path != os.sep]
    packages = os.path.join(ours, "prorl_nemo")
    prefixes = [sys.prefix, sys.base_prefix, "/usr/lib", "/usr/lib64", "/usr/share", "/lib"]
    return [*prefixes, packages, *(p for p in imported if os.path.abspath(p) != ours)]
