"""Exact resume with the real trainer, engine and graders: the short form of `make test-kill`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kill"))

from killed_run import ACTORS, killed_run
from real_run import events_of


def test_a_killed_run_ends_as_one_that_never_was(tmp_path: Path) -> None:
    """Killed as a whole once, then a trainer rank alone: it goes on from its last checkpoint, and
    ends with the same weights, optimizer, reference, metrics and samples, bit for bit."""
    found = killed_run(tmp_path, steps=9, kills=1, seed=3, actors=ACTORS[:1])
    assert found["differences"] == []
    assert len(found["kills"]) == 2
    assert found["restarts_by_itself"] == 1
    assert found["stage_changes"] == 2
    assert found["reference_resets"] >= 2
    # Policy, reference, main weights and two moments of each; Megatron stores layers as one tensor.
    assert found["compared"]["tensors"] == 5 * 8
    resumed = events_of(tmp_path / "killed" / "resets", "resumed")
    assert resumed, "the run was not killed after its first checkpoint"
