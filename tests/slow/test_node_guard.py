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
    """For the agent: short, because Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="g", dir="/tmp") as folder:
        yield Path(folder)


def test_a_killed_guard_leaves_nothing(tmp_path: Path, temporary: Path) -> None:
    """Neither the run nor Ray nor their folders, soon enough for the next attempt to wait for it;
    nor does a guard that is asked to end, whose run saves."""
    changes = [f"runs_dir={tmp_path}/runs", "stages=[{steps: 5000}]"]
    changes += ["policy.data_parallel=1", "rollout.engines=1", "faults.stop_seconds=100"]
    run_dir, tries = tmp_path / "runs" / "two-nodes", iter("ab")

    def attempt() -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
        """The guard and all below it, once the run has gone further."""
        folder = tmp_path / next(tries)
        folder.mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PRORL_", "SLURM"))}
        kept |= {"TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
        kept |= {"PRORL_MIN_MEMORY_GIB": "1", "PRORL_MIN_DISK_GIB": "0.1"}
        command = [sys.executable, "-m", "prorl_nemo.cluster.node_guard", str(folder), "train"]
        metrics = run_dir / "metrics.jsonl"
        before = metrics.stat().st_size if metrics.exists() else 0
        with (folder / "log").open("wb") as log:
            guard = subprocess.Popen(
                [*command, str(ROOT / "recipes/smoke/two_nodes.yaml"), *changes],
                env=kept,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

        def further() -> bool:
            assert guard.poll() is None, (folder / "log").read_text()
            return metrics.exists() and metrics.stat().st_size > before

        until(further, 300.0)
        return guard, psutil.Process(guard.pid).children(recursive=True)

    guard, below = attempt()
    try:
        names = {process.name() for process in below}
        assert {"prorl", "raylet", "gcs_server"} <= names, names
        guard.send_signal(signal.SIGKILL)
        guard.wait()
        until(lambda: not any(map(running, below)), 30.0)
        until(lambda: not list(temporary.iterdir()), 5.0)
        assert (tmp_path / "a" / "status").read_text().startswith("129 ended, because")

        guard, below = attempt()
        guard.send_signal(signal.SIGTERM)
        assert guard.wait(120.0) == 3, (tmp_path / "b" / "log").read_text()
        assert not any(map(running, below)) and not list(temporary.iterdir())
        assert (tmp_path / "b" / "status").read_text() == "3 prorl train ended with status 3\n"
        assert "resumed" in (run_dir / "events.jsonl").read_text()
    finally:
        for process in [guard, *below]:
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                process.kill()
        guard.wait()


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
