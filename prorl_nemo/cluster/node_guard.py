"""What Slurm starts on a node: stands between Slurm and the agent (node_agent.py).

    python -m prorl_nemo.cluster.node_guard FOLDER train RECIPE ...

Where Slurm does not track processes by cgroups, its SIGKILL can end what it started and miss what
that has started: a run would go on in a job that is over, and hold its folder against the next.
So the agent is a child in a session of its own, and whichever of the two is killed, the other one
ends every process below. Under cgroups both are killed together with all the others.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType

import psutil

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
_KILLS = 5


def main() -> int:
    agent: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        early.append(number) if agent is None else agent.send_signal(number)

    for forwarded in FORWARDED:
        signal.signal(forwarded, forward)
    adopt_orphans()
    command = [sys.executable, "-m", "prorl_nemo.cluster.node_agent", f"--guard={os.getpid()}"]
    agent = subprocess.Popen([*command, *sys.argv[1:]], start_new_session=True)
    for number in early:
        agent.send_signal(number)
    status = agent.wait()
    end_below()
    return status if status >= 0 else 128 - status


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
