"""What Slurm starts on a node: stands between Slurm and the agent (node_agent.py).

    python -m prorl_nemo.cluster.node_guard FOLDER train RECIPE ...

Where Slurm does not track processes by cgroups, its SIGKILL can end what it started and miss what
that has started: a run would go on in a job that is over, and hold its folder against the next.
So the agent is a child in a session of its own, and whichever of the two is killed, the other one
ends every process below. Where both are killed together with all the others, an orphan outside
their tree removes their folder; under cgroups it is killed as well, and the folder stays.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
_KILLS = 5
# 107 bytes less those of
# /prorl12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1
_LONGEST_FOLDER = 23


def main() -> int:
    with tempfile.TemporaryDirectory(
        prefix="prorl", dir=short_temporary(), ignore_cleanup_errors=True
    ) as temporary:
        return _guard(Path(temporary))


def _guard(temporary: Path) -> int:
    agent: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        early.append(number) if agent is None else agent.send_signal(number)

    for forwarded in FORWARDED:
        signal.signal(forwarded, forward)
    ours = _sweeper(temporary)
    adopt_orphans()
    command = [sys.executable, "-m", "prorl_nemo.cluster.node_agent", *sys.argv[1:]]
    command[3:3] = [f"--guard={os.getpid()}", f"--temporary={temporary}"]
    # Its own temporary files, too, are in the folder that is removed whatever is killed.
    environment = os.environ | {"TMPDIR": str(temporary)}
    agent = subprocess.Popen(command, start_new_session=True, pass_fds=(ours,), env=environment)
    for number in early:
        agent.send_signal(number)
    status = agent.wait()
    end_below()
    return status if status >= 0 else 128 - status


def _sweeper(folder: Path) -> int:
    """An orphan that removes `folder` when all who have the file descriptor returned are gone."""
    theirs, ours = os.pipe()
    # One second: those killed with us may be writing still.
    script = 'exec 3<&0; (read -r _; sleep 1; rm -rf -- "$1") <&3 >/dev/null 2>&1 &'
    subprocess.run(["sh", "-c", script, "sh", folder], stdin=theirs, start_new_session=True)
    os.close(theirs)
    return ours


def short_temporary() -> str:
    """The folder for temporary files, or /tmp where its name leaves too little room for Ray's
    sockets below it, whose names end at 107 bytes."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= _LONGEST_FOLDER else "/tmp"


def adopt_orphans() -> None:
    """Descendants whose parent ends become this process's children, so none can be left behind."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def hang_up_after(guard: int) -> None:
    """SIGHUP to this process as soon as its parent, the process `guard`, is gone."""
    _prctl(_SET_PDEATHSIG, signal.SIGHUP)
    if os.getppid() != guard:  # Gone before it was asked for.
        signal.raise_signal(signal.SIGHUP)


def end_below(grace: float = 0.0) -> None:
    """Kill every process below this one that does not end by itself within `grace` seconds."""
    below = psutil.Process().children(recursive=True)
    psutil.wait_procs(below, timeout=grace)
    for _ in range(_KILLS):  # What is killed may have started another one just before.
        below = psutil.Process().children(recursive=True)
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if not psutil.wait_procs(below, timeout=1.0)[1]:
            return


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
