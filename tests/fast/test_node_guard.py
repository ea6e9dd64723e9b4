"""The guard and the agent behind it, as processes: whichever is killed, nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

Guard = Callable[..., subprocess.Popen[str]]
SECONDS = 60.0


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Short, as Ray's sockets want it; empty in the end."""
    with tempfile.TemporaryDirectory(prefix="g", dir="/tmp") as folder:
        yield Path(folder)
        until(lambda: not list(Path(folder).iterdir()), seconds=10.0)


@pytest.fixture
def guard(tmp_path: Path, temporary: Path) -> Iterator[Guard]:
    """Starts a guard whose agent is the first of two nodes, and waits for the other one."""
    started: list[subprocess.Popen[str]] = []
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PRORL_", "SLURM"))}
    kept |= {"PRORL_NODES": "a b", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "0"}
    kept |= {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(temporary)}

    def start(**settings: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "prorl_nemo.cluster.node_guard", str(tmp_path), "train"]
        started.append(
            subprocess.Popen(command, env=kept | settings, stdout=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def waiting_agent(guard: subprocess.Popen[str], folder: Path) -> psutil.Process:
    """The agent, once it waits for the other node."""
    until(lambda: (folder / "head").exists())
    (agent,) = psutil.Process(guard.pid).children()
    return agent


def until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_guard_ends_the_agent(guard: Guard, tmp_path: Path) -> None:
    outer = guard()
    agent = waiting_agent(outer, tmp_path)
    assert os.getsid(agent.pid) == agent.pid, "a session of its own"
    outer.kill()
    until(lambda: not agent.is_running(), seconds=10.0)
    assert (tmp_path / "status").read_text().startswith("129 ended, because the process")
    assert outer.stdout is not None
    assert "that Slurm had started was killed" in outer.stdout.read(), "in the same log"


def test_a_killed_agent_ends_the_guard(guard: Guard, tmp_path: Path, temporary: Path) -> None:
    outer = guard()
    agent = waiting_agent(outer, tmp_path)
    assert list(temporary.iterdir())
    agent.kill()
    assert outer.wait(10.0) == 128 + signal.SIGKILL
    assert not list(temporary.iterdir())


def test_both_killed_leave_no_folder(guard: Guard, tmp_path: Path, temporary: Path) -> None:
    """As by Slurm, where it follows the tree of processes."""
    outer = guard()
    agent = waiting_agent(outer, tmp_path)
    for process in (outer, agent):
        process.send_signal(signal.SIGSTOP)
    assert list(temporary.iterdir())
    for process in (outer, agent):
        process.send_signal(signal.SIGKILL)
    until(lambda: not list(temporary.iterdir()), seconds=10.0)
    assert not (tmp_path / "status").exists(), "nothing of ours had time for it"


def test_a_signal_reaches_the_agent(guard: Guard, tmp_path: Path) -> None:
    outer = guard()
    waiting_agent(outer, tmp_path)
    outer.terminate()
    assert outer.wait(10.0) == 128 + signal.SIGTERM
    assert (tmp_path / "status").read_text() == "143 stopped before the run began\n"


def test_a_signal_before_there_is_an_agent(guard: Guard) -> None:
    """As soon as the guard takes signals at all, none is lost."""
    outer = guard()
    until(lambda: _catches(outer.pid, signal.SIGTERM))
    outer.terminate()
    assert outer.wait(30.0) == 128 + signal.SIGTERM


def test_the_exit_status_is_the_agents(guard: Guard) -> None:
    outer = guard(PRORL_MIN_DISK_GIB="4G")
    assert outer.wait(SECONDS) == 71
    assert outer.stdout is not None
    assert "PRORL_MIN_DISK_GIB: '4G' is no number" in outer.stdout.read()


def _catches(pid: int, number: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)
