"""The wall clock of a real run's controller jumps hours ahead, then back: nothing happens."""

from __future__ import annotations

import subprocess
from pathlib import Path

from real_run import RealRun, events_of, rows_of

STEPS = 8
HOUR = 3600


def test_a_clock_that_jumps(tmp_path: Path) -> None:
    library, shift = tmp_path / "shifted_clock.so", tmp_path / "shift"
    source = Path(__file__).with_name("shifted_clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    shift.write_text("0\n")
    settings = [
        f"stages=[{{steps: {STEPS}}}]",
        "validation.at_start=false",
        "validation.interval=1000",
        "checkpoint.interval=2",
        "faults.wall_clock_hours=2",
        "faults.silent_seconds=60",
        "rollout.engine_hang_seconds=60",
        f"runs_dir={tmp_path}",
    ]
    environment = {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(shift)}
    with RealRun(settings, tmp_path / "log", environment) as run:
        for step, hours in ((2, 5), (4, -20), (6, 0)):
            run.wait_for_step(step)
            shift.write_text(f"{hours * HOUR}\n")
        assert run.finish() == 0, run.output()
    rows = rows_of(run.folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    clock = [row["time"] for row in rows]
    # It did jump, in the rows' time stamps.
    assert max(clock) - min(clock) > 20 * HOUR
    assert all(0 < row["time/step"] < 120 for row in rows)
    names = {event["event"] for event in events_of(run.folder)}
    assert not names & {"restarted", "engine_restarted", "stopped", "checkpoint_failed"}
