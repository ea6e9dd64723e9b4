"""An attempt of one node, with a real Ray and a real run: what a killed guard leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """For the agents: short, because Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="g", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Guards; none outlives its test, and what is below goes with it."""
    guards: list[subprocess.Popen[bytes]] = []
    yield guards
    for guard in guards:
        guard.kill()
        guard.wait()


@pytest.mark.timeout(1200)
def test_a_killed_guard_leaves_nothing(
    tmp_path: Path, temporary: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    """Neither the run nor Ray nor their folders, soon enough for the next attempt to wait for it;
    nor does a guard that is asked to end, whose run saves."""
    changes = [f"runs_dir={tmp_path}/runs", "stages=[{steps: 5000}]", "checkpoint.interval=1"]
    changes += ["policy.data_parallel=1", "rollout.engines=1", "faults.stop_seconds=100"]
    run_dir, tries = tmp_path / "runs" / "two-nodes", iter("ab")
    metrics = run_dir / "metrics.jsonl"

    def steps() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def attempt() -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
        """The guard and all below it, once the run is three steps further."""
        folder, before = tmp_path / next(tries), steps()
        folder.mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PRORL_", "SLURM"))}
        kept |= {"TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
        kept |= {"PRORL_MIN_MEMORY_GIB": "1", "PRORL_MIN_DISK_GIB": "0.1"}
        command = [sys.executable, "-m", "prorl_nemo.cluster.node_guard", str(folder), "train"]
        command += [str(ROOT / "recipes/smoke/two_nodes.yaml"), *changes]
        with (folder / "log").open("wb") as log:
            guard = subprocess.Popen(command, env=kept, stdout=log, stderr=subprocess.STDOUT)
        started.append(guard)

        def further() -> bool:
            assert guard.poll() is None, (folder / "log").read_text()
            return steps() >= before + 3

        until(further, 400.0)  # Ray alone has taken three minutes to start on busy cores.
        return guard, psutil.Process(guard.pid).children(recursive=True)

    guard, below = attempt()
    names = {process.name() for process in below}
    assert {"prorl", "raylet", "gcs_server"} <= names, names
    guard.send_signal(signal.SIGKILL)
    guard.wait()
    began = time.monotonic()
    until(lambda: not any(map(running, below)), 30.0)
    print(f"all ended {time.monotonic() - began:.1f} s after the guard was killed")
    until(lambda: not list(temporary.glob("prorl*")), 5.0)
    assert (tmp_path / "a" / "status").read_text().startswith("129 ended, because")

    guard, below = attempt()
    guard.send_signal(signal.SIGTERM)
    assert guard.wait(120.0) == 0, (tmp_path / "b" / "log").read_text()
    assert not any(map(running, below)) and not list(temporary.glob("prorl*"))
    assert (tmp_path / "b" / "status").read_text() == "0 prorl train ended with status 0\n"
    assert "resumed" in (run_dir / "events.jsonl").read_text()


def running(process: psutil.Process) -> bool:
    """Not a zombie either, which only somebody else can clear."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds:.0f} s"
        time.sleep(0.1)
