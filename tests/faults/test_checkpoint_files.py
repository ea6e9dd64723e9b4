"""Checkpoint files of a real run that are altered, cut short or gone: found, said, and gone back
from, to a run that ends as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from compare_runs import compare
from real_run import RealRun, events_of

from prorl_nemo.training.run_state import Checkpoints, DamagedCheckpoint

STEPS = 8
SETTINGS = [
    f"stages=[{{steps: {STEPS}}}]",
    "validation.at_start=false",
    "validation.interval=4",
    "checkpoint.interval=2",
    "checkpoint.keep_last=3",
]
PLACES = 12
"""In each file, where a bit is flipped or the rest cut off."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with the checkpoints of steps 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    with RealRun([*SETTINGS, f"runs_dir={folder}"], folder / "log") as run:
        assert run.finish() == 0, run.output()
    return run.folder


def test_damage_to_any_file_at_any_place_is_found(finished: Path, tmp_path: Path) -> None:
    original = finished / "checkpoints" / f"step_{STEPS:06d}"
    copy = tmp_path / original.name
    shutil.copytree(original, copy)
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    checkpoints.verify(STEPS)
    files = [file for file in sorted(copy.rglob("*")) if file.is_file()]
    # Megatron's shards and metadata, random state, state and manifest.
    assert len(files) >= 6
    assert sum(file.stat().st_size for file in files) > 1 << 20
    rng = random.Random(1)
    for file in files:
        content = file.read_bytes()
        damages = [b"", content + b"\0", None]
        for _ in range(PLACES):
            place = rng.randrange(len(content) - 1)  # The manifest is whole without its newline.
            flipped = bytes([content[place] ^ 1 << rng.randrange(8)])
            damages += [content[:place] + flipped + content[place + 1 :], content[:place]]
        for damage in damages:
            file.unlink()
            if damage is not None:
                file.write_bytes(damage)
            with pytest.raises(DamagedCheckpoint, match=file.name):
                checkpoints.verify(STEPS)
            file.write_bytes(content)
    checkpoints.verify(STEPS)


def test_a_run_goes_back_past_damaged_checkpoints_and_ends_the_same(
    finished: Path, tmp_path: Path
) -> None:
    """The last two are damaged: the run says so, goes on from the third, and does its steps again,
    with the same weights, metrics and samples at the end."""
    runs = tmp_path / "runs"
    run = shutil.copytree(finished, runs / finished.name)
    checkpoints = run / "checkpoints"
    shard = max((checkpoints / "step_000008").rglob("*.distcp"), key=lambda f: f.stat().st_size)
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0x10]))
    metadata = checkpoints / "step_000006" / "policy" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-7])
    with RealRun([*SETTINGS, f"runs_dir={runs}"], tmp_path / "log") as again:
        assert again.finish() == 0, again.output()
    damaged = {e["damaged_step"]: e["reason"] for e in events_of(run, "checkpoint_damaged")}
    assert set(damaged) == {6, 8}
    assert shard.name in damaged[8]
    assert ".metadata" in damaged[6]
    assert [event["step"] for event in events_of(run, "resumed")] == [4]
    assert compare(finished, run) == []


def test_a_run_without_a_whole_checkpoint_does_not_start_over(
    finished: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    run = shutil.copytree(finished, runs / finished.name)
    for checkpoint in (run / "checkpoints").glob("step_*"):
        (checkpoint / "state.json").unlink()
    with RealRun([*SETTINGS, f"runs_dir={runs}"], tmp_path / "log") as again:
        assert again.finish() == 2
    assert "checkpoints: none of" in again.output()
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
