"""Updates with NaN gradients: counted over steps, their samples saved, the run stopped at last."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prorl_nemo.errors import UserError
from prorl_nemo.training.batch import TrainingBatch
from prorl_nemo.training.skipped_updates import SkippedUpdates

DONE, SKIPPED = {"skipped": 0.0, "grad_norm": 1.0}, {"skipped": 1.0, "grad_norm": float("nan")}


def batch() -> TrainingBatch:
    """Four groups of one sample; the third has a log-prob of minus infinity."""
    logprobs = [np.array([-1.0, -2.0], dtype=np.float32) for _ in range(4)]
    broken = [*logprobs[:2], np.array([-1.0, -np.inf], dtype=np.float32), logprobs[3]]
    return TrainingBatch(
        prompts=[[1], [2], [3], [4]],
        groups=[[0], [1], [2], [3]],
        responses=[np.array([7, 8], dtype=np.int64)] * 4,
        engine_logprobs=broken,
        advantages=[0.5, -0.5, 1.0, float("nan")],
        temperature=1.0,
        old_logprobs=logprobs,
        reference_logprobs=logprobs,
    )


def test_samples_of_skipped_updates_are_saved(tmp_path: Path) -> None:
    skipped = SkippedUpdates(tmp_path / "skipped", limit=3)
    skipped.count(1, batch(), 2, [DONE, DONE])
    assert not skipped.folder.exists()
    skipped.count(2, batch(), 2, [DONE, SKIPPED])
    assert skipped.in_a_row == 1
    text = (skipped.folder / "step_000002.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    # The second of two minibatches has the last two groups.
    assert [(row["update"], row["group"], row["prompt_ids"]) for row in rows] == [
        (1, 2, [3]),
        (1, 3, [4]),
    ]
    assert [row["finite"] for row in rows] == [False, True]
    assert rows[0]["engine_logprobs"] == [-1.0, None]
    assert rows[1]["advantage"] is None
    assert rows[1]["response_ids"] == [7, 8]


def test_only_updates_in_a_row_stop_the_run(tmp_path: Path) -> None:
    skipped = SkippedUpdates(tmp_path / "skipped", limit=3)
    skipped.count(1, batch(), 4, [SKIPPED, SKIPPED, DONE, SKIPPED])
    assert skipped.in_a_row == 1
    with pytest.raises(UserError, match=r"3 updates in a row .* step 2.*step_000002\.jsonl"):
        skipped.count(2, batch(), 4, [SKIPPED, SKIPPED, DONE, DONE])
    assert (skipped.folder / "step_000002.jsonl").exists()


def test_samples_that_cannot_be_written_do_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "skipped").write_text("no folder can be made here")
    skipped = SkippedUpdates(tmp_path / "skipped", limit=3)
    skipped.count(1, batch(), 2, [DONE, SKIPPED])
    assert skipped.in_a_row == 1
