"""A disk that fills up, or turns read-only, while a real run trains on it.

The disk is a file with an ext4 file system, mounted for the test: root is needed.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_run import RealRun, events_of, rows_of, short_run

STEPS = 14
SETTINGS = short_run(STEPS)


class Disk:
    """An ext4 file system of its own, of 32 MiB: about ten checkpoints of the tiny model."""

    def __init__(self, folder: Path) -> None:
        self.image, self.path = folder / "disk.img", folder / "disk"
        self.path.mkdir()
        with self.image.open("wb") as file:
            file.truncate(32 << 20)
        command("mkfs.ext4", "-q", "-F", str(self.image))
        self.mount()

    def mount(self) -> None:
        command("mount", "-o", "loop,errors=remount-ro", str(self.image), str(self.path))

    def unmount(self) -> None:
        command("umount", "--lazy", str(self.path))

    def fill(self) -> None:
        """Take all that is free; again and again, for a save that fails gives back what it had."""
        with (self.path / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def make_room(self) -> None:
        (self.path / "filler").unlink()

    def turn_read_only(self) -> None:
        """What the kernel does when it finds the file system in disorder."""
        device = command("findmnt", "-no", "SOURCE", str(self.path)).strip()
        fault = Path("/sys/fs/ext4") / Path(device).name / "trigger_fs_error"
        with contextlib.suppress(OSError):  # The write that causes the error may be told of it.
            fault.write_text("1\n")

    def mend(self) -> None:
        """As after a restart of the machine."""
        self.unmount()
        subprocess.run(["fsck.ext4", "-f", "-y", str(self.image)], capture_output=True, check=False)
        self.mount()


def command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path)
    yield made
    made.unmount()


def test_a_disk_that_fills_up_costs_rows_and_checkpoints_and_no_step(
    disk: Disk, tmp_path: Path
) -> None:
    with RealRun([*SETTINGS, f"runs_dir={disk.path}"], tmp_path / "log") as run:
        run.wait_for_step(3)
        before = run.step()

        def reached() -> bool:
            disk.fill()
            # The title tells the step, since the metrics cannot.
            return f"step {before + 5}," in run.title

        run.wait_until(reached)
        disk.make_room()
        assert run.finish() == 0, run.output()
    lost = events_of(run.folder, "rows_lost")
    assert sum(event["rows"] for event in lost) >= 1
    assert all(event["of"] == "diary" for event in lost)
    # Every line is whole, and the steps that are missing are those that were said to be lost.
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if row["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    assert 1 <= STEPS - len(steps) <= sum(event["rows"] for event in lost)
    assert (run.folder / "checkpoints" / f"step_{STEPS:06d}").exists()


def test_a_disk_that_turns_read_only_does_not_end_the_run_before_its_last_step(
    disk: Disk, tmp_path: Path
) -> None:
    """The steps since the last checkpoint cannot be kept; the run says so, and when the disk is
    mended the same command does them again."""
    settings = [*SETTINGS, f"runs_dir={disk.path}"]
    with RealRun(settings, tmp_path / "log") as run:
        run.wait_until(lambda: bool(events_of(run.folder, "checkpoint_saved")))
        disk.turn_read_only()
        run.wait_until(lambda: f"step {STEPS}," in run.title)
        assert run.finish() == 2, run.output()
    assert "could not be written" in run.output()
    assert "the same command resumes" in run.output()
    disk.mend()
    with RealRun(settings, tmp_path / "log2") as again:
        assert again.finish() == 0, again.output()
    assert [event["step"] for event in events_of(again.folder, "resumed")]
    steps = [row["step"] for row in rows_of(again.folder)]
    # A disk in disorder may have lost rows it had taken; then that is an event.
    if steps != list(range(1, STEPS + 1)):
        assert events_of(again.folder, "figures_missing")
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
