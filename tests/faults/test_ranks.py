"""A trainer rank that hangs or dies: a real run starts its processes anew, by itself, up to a
limit. (One that dies once is in tests/slow/test_resume.py, with what the run ends as.)"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from real_run import RANK, RealRun, events_of, rows_of, short_run

STEPS = 8
SETTINGS = short_run(STEPS)


def hang(run: RealRun, phase: str, rank: int = -1) -> int:
    """Stop a rank's process in a phase of the fourth step or a later one; it hears no signal but
    SIGKILL from then on. Its process id."""
    run.wait_for_step(3)
    run.wait_until(lambda: run.phase == phase)
    process = run.actors(RANK)[rank]
    os.kill(process, signal.SIGSTOP)
    return process


def went_on(run: RealRun, process: int, reason: str) -> None:
    """The run is at its end, started anew once, and the process that hung is gone."""
    assert run.finish() == 0, run.output()
    (restarted,) = events_of(run.folder, "restarted")
    assert reason in restarted["reason"]
    assert [row["step"] for row in rows_of(run.folder)] == list(range(1, STEPS + 1))
    (resumed,) = events_of(run.folder, "resumed")
    # From the last checkpoint; a save that was under way may have been lost with the rank.
    assert 2 <= resumed["step"] <= restarted["reached_step"]
    deadline = time.monotonic() + 20  # A zombie until Ray takes note.
    while time.monotonic() < deadline and alive(process):
        time.sleep(0.1)
    assert not alive(process)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def test_a_rank_that_gives_no_sign_of_life(tmp_path: Path) -> None:
    settings = [*SETTINGS, f"runs_dir={tmp_path}", "faults.silent_seconds=5"]
    with RealRun(settings, tmp_path / "log") as run:
        process = hang(run, "train")
        went_on(run, process, "gave no sign of life for 5 seconds")


def test_a_rank_that_waits_in_a_collective_for_one_that_hangs(tmp_path: Path) -> None:
    """The watchdog of the collectives, long before the hung rank itself is asked."""
    settings = [
        *SETTINGS,
        f"runs_dir={tmp_path}",
        "policy.data_parallel=2",
        "faults.silent_seconds=120",
        "faults.collective_seconds=8",
    ]
    with RealRun(settings, tmp_path / "log") as run:
        process = hang(run, "train")
        went_on(run, process, "lost another one")


def test_a_rank_that_dies_again_and_again_ends_the_run_at_the_limit(tmp_path: Path) -> None:
    settings = [*SETTINGS, f"runs_dir={tmp_path}", "faults.max_restarts=1"]
    with RealRun(settings, tmp_path / "log") as run:
        run.wait_for_step(3)
        run.wait_until(lambda: run.phase == "generate")
        os.kill(run.actors(RANK)[0], signal.SIGKILL)
        run.wait_for_event("restarted")
        run.wait_for_event("resumed")
        # In the first step after the restart: no new step is finished in between.
        os.kill(run.actors(RANK)[0], signal.SIGKILL)
        assert run.finish() == 4, run.output()
    assert "faults.max_restarts" in run.output()
    assert "The same command resumes from the last checkpoint" in run.output()
