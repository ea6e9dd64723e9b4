"""A run that goes on in another layout works on the same batches (docs/resume.md)."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from real_run import RealRun, events_of, rows_of, short_run

STEPS = 8
SETTINGS = short_run(STEPS)
LAYOUT = ["policy.pipeline_parallel=2"]


def samples(run: Path, step: int) -> list[dict[str, Any]]:
    lines = (run / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_batches_of_a_run_that_goes_on_in_another_layout(tmp_path: Path) -> None:
    with RealRun([*SETTINGS, f"runs_dir={tmp_path / 'one'}"], tmp_path / "log") as one:
        assert one.finish() == 0, one.output()
    settings = [*SETTINGS, f"runs_dir={tmp_path / 'two'}"]
    with RealRun(settings, tmp_path / "log2") as two:
        two.wait_for_step(3)
        two.popen.send_signal(signal.SIGTERM)
        assert two.finish() == 0, two.output()
    before = len(rows_of(two.folder))
    with RealRun([*settings, *LAYOUT], tmp_path / "log3") as two:
        assert two.finish() == 0, two.output()
    (changed,) = events_of(two.folder, "recipe_changed")
    assert changed["changes"]["policy.pipeline_parallel"] == [1, 2]
    # The weights were split over two ranks and put together again without a rounding: the first
    # batch is the same to the last token, score and advantage.
    assert samples(two.folder, before + 1) == samples(one.folder, before + 1)
    rows = {run: {row["step"]: row for row in rows_of(run.folder)} for run in (one, two)}
    for step in range(1, STEPS + 1):
        a, b = rows[one][step], rows[two][step]
        for key in a:
            if key.startswith("rollout/drawn/"):
                assert a[key] == b[key], f"step {step}: {key}"
        asked = [[s["prompt_id"] for s in samples(run.folder, step)] for run in (one, two)]
        assert asked[0] == asked[1], f"step {step}"
        # Two layouts add in another order; over a few steps in fp32 that stays rounding.
        assert b["policy/kl"] == pytest.approx(a["policy/kl"], rel=1e-2, abs=1e-7)
        assert b["policy/grad_norm"] == pytest.approx(a["policy/grad_norm"], rel=1e-2)
