"""A loss that is NaN in the real trainer: no update, nothing lost, and an end to it.

One number of the reference is made NaN in a checkpoint. So is then every KL, every loss and every
gradient, while policy and engine are sound.
"""

from __future__ import annotations

import io
import shutil
import signal
from pathlib import Path

import pytest
import torch
from compare_runs import checkpoint_tensors, last_checkpoint, same_bits
from real_run import RealRun, events_of, rows_of
from torch.distributed.checkpoint import FileSystemReader

from prorl_nemo.training.run_state import Checkpoints, _write_manifest

RESET = 6
STEPS = 8
SETTINGS = [
    f"stages=[{{steps: {STEPS}}}]",
    f"reference_reset={{interval: {RESET}, kl_factor: null, stalled_evaluations: null}}",
    "validation.at_start=false",
    "validation.interval=1000",
    "checkpoint.interval=1",
]
REFERENCE = "reference.decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a run that was stopped after its second step, or a little later."""
    folder = tmp_path_factory.mktemp("poisoned")
    with RealRun([*SETTINGS, f"runs_dir={folder}"], folder / "log") as run:
        run.wait_for_step(2)
        run.popen.send_signal(signal.SIGTERM)
        assert run.finish() == 0, run.output()
    poison(last_checkpoint(run.folder))
    return folder


def poison(checkpoint: Path) -> None:
    """NaN into one tensor of the reference, and a manifest that says it was written so."""
    policy = checkpoint / "policy"
    metadata = FileSystemReader(policy).read_metadata()
    places = {index.fqn: place for index, place in metadata.storage_data.items()}
    place = places[REFERENCE]
    with (policy / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        tensor = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        tensor.view(-1)[0] = float("nan")
        written = io.BytesIO()
        torch.save(tensor, written)
        assert written.tell() == place.length
        file.seek(place.offset)
        file.write(written.getvalue())
    step = int(checkpoint.name.removeprefix("step_"))
    (checkpoint / "manifest.json").unlink()
    _write_manifest(checkpoint, step)
    Checkpoints(checkpoint.parent, 1).verify(step)


def test_updates_are_skipped_until_a_reset_heals_the_reference(
    poisoned: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(poisoned / "resets", tmp_path / "resets")
    before = len(rows_of(run))
    assert before < RESET
    settings = [
        *SETTINGS,
        f"runs_dir={tmp_path}",
        "checkpoint.keep_last=20",
        "policy.optimizer.max_skipped_updates=100",
    ]
    with RealRun(settings, tmp_path / "log") as again:
        assert again.finish() == 0, again.output()
    skipped = {row["step"]: row["policy/skipped_updates"] for row in rows_of(run)}
    bad = range(before + 1, RESET + 1)
    assert skipped == {step: 2 * (step in bad) for step in range(1, STEPS + 1)}
    assert [row["step"] for row in rows_of(run) if row.get("policy/kl") is None] == list(bad)
    assert sorted(f.stem for f in (run / "skipped").iterdir()) == [f"step_{s:06d}" for s in bad]
    assert [event["step"] for event in events_of(run, "reference_reset")] == [RESET]
    # Neither weights nor moments moved while the loss was NaN; then they did.
    first, last, end = (
        checkpoint_tensors(run / "checkpoints" / f"step_{step:06d}" / "policy")
        for step in (before, RESET, STEPS)
    )
    policy = [key for key in first if not key.startswith("reference.")]
    assert all(same_bits(first[key], last[key]) for key in policy)
    assert not all(same_bits(last[key], end[key]) for key in policy)
    assert all(bool(torch.isfinite(t).all()) for t in end.values() if isinstance(t, torch.Tensor))


def test_too_many_in_a_row_end_the_run_and_name_their_samples(
    poisoned: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(poisoned / "resets", tmp_path / "resets")
    settings = [*SETTINGS, f"runs_dir={tmp_path}", "policy.optimizer.max_skipped_updates=3"]
    with RealRun(settings, tmp_path / "log") as again:
        assert again.finish() == 2, again.output()
    assert "policy.optimizer.max_skipped_updates: 3 updates in a row" in again.output()
    assert any((run / "skipped").iterdir())
