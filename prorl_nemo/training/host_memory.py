"""How much memory this process may still take: of the machine, or of its container or Slurm job.

The machine's free memory alone misleads inside a control group: the kernel ends a
run at the group's limit, hours after a check against the machine let it start.
"""

from __future__ import annotations

from pathlib import Path

import psutil

# Where each version of control groups is mounted, and its files: limit, usage, reclaimable cache.
_VERSION_2 = ("", "memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_bytes(
    groups: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes that can be taken without swapping and without reaching a control group's limit."""
    left = [psutil.virtual_memory().available]
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # Not Linux.
        return left[0]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            left += _left_in(mounts, path, *_VERSION_1)
        elif not controllers:
            left += _left_in(mounts, path, *_VERSION_2)
    return max(0, min(left))


def _left_in(mounts: Path, path: str, mount: str, limit: str, usage: str, cache: str) -> list[int]:
    """What the group and each of its parents leave; groups without a limit are passed over."""
    root = mounts / mount
    group = root / path.lstrip("/")
    left = []
    for folder in [group, *group.parents]:
        if not folder.is_relative_to(root):
            break
        try:
            most = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # No such file here, or `max`: no limit.
            continue
        left.append(most - used + int(stat.get(cache, 0)))
    return left
