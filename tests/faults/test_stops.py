"""A real run that is asked to stop, by a signal or by the clock, is saved and ends in time."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from real_run import RANK, RealRun, events_of, rows_of

SETTINGS = [
    "stages=[{steps: 1000}]",
    "validation.at_start=false",
    "validation.interval=1000",
    "checkpoint.interval=50",
]


def saved_at_last_step(run: RealRun) -> None:
    steps = [row["step"] for row in rows_of(run.folder)]
    assert steps == list(range(1, len(steps) + 1))
    assert (run.folder / "checkpoints" / f"step_{steps[-1]:06d}" / "state.json").exists()


def test_sigusr1_saves_the_last_step_within_the_set_time(tmp_path: Path) -> None:
    settings = [*SETTINGS, f"runs_dir={tmp_path}", "faults.stop_seconds=40"]
    with RealRun(settings, tmp_path / "log") as run:
        run.wait_for_step(2)
        asked = time.monotonic()
        run.popen.send_signal(signal.SIGUSR1)
        assert run.finish() == 0, run.output()
        assert time.monotonic() - asked < 40
    saved_at_last_step(run)
    (stopped,) = events_of(run.folder, "stopped")
    assert stopped["reason"] == "SIGUSR1"


def test_a_step_that_takes_longer_than_the_set_time_is_given_up(tmp_path: Path) -> None:
    """Its updates have begun and would have to be finished; the run ends before, and says so."""
    stop_seconds = 4
    settings = [
        *SETTINGS,
        f"runs_dir={tmp_path}",
        f"faults.stop_seconds={stop_seconds}",
        "checkpoint.interval=1",
    ]
    with RealRun(settings, tmp_path / "log") as run:
        run.wait_until(lambda: bool(events_of(run.folder, "checkpoint_saved")))
        run.wait_until(lambda: run.phase == "train")
        # Its rank is stopped, so that the updates last.
        (rank,) = run.actors(RANK)
        asked = time.monotonic()
        os.kill(rank, signal.SIGSTOP)
        run.popen.send_signal(signal.SIGTERM)
        status = run.finish()
        took = time.monotonic() - asked
        assert status in (2, 3), run.output()
        assert took < stop_seconds + 3  # Of a busy machine: the process itself ends at 4 s.
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)  # If there was no time left to end it.
    if status == 2:
        assert "faults.stop_seconds" in run.output()
        assert "without saving" in events_of(run.folder, "stopped")[-1]["reason"]
    else:
        assert f"ended {stop_seconds} s after SIGTERM" in run.output()
    assert any((run.folder / "checkpoints").glob("step_*"))


def test_the_end_of_a_slurm_job_is_not_reached(tmp_path: Path) -> None:
    """Resumed, the run knows from its event log what a save costs; it stops so much before the
    end, saved, having used the time until then."""
    settings = [*SETTINGS, f"runs_dir={tmp_path}"]
    with RealRun(settings, tmp_path / "first") as run:
        run.wait_for_step(3)
        run.popen.send_signal(signal.SIGTERM)
        assert run.finish() == 0, run.output()
    end = int(time.time()) + 150
    with RealRun(settings, tmp_path / "second", {"SLURM_JOB_END_TIME": str(end)}) as run:
        assert run.finish() == 0, run.output()
    assert end - 60 < time.time() < end
    saved_at_last_step(run)
    stopped = events_of(run.folder, "stopped")[-1]
    assert "wall clock" in stopped["reason"]
    assert rows_of(run.folder)[-1]["step"] > 4
