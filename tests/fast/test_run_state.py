"""Checkpoints: a folder named step_NNNNNN is whole, whenever the process was ended, and what
happens to it on disk later is found."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prorl_nemo.errors import UserError
from prorl_nemo.training import run_state
from prorl_nemo.training.run_state import (
    BeginSave,
    Checkpoints,
    DamagedCheckpoint,
    FinishSave,
    SaveOutcome,
)
from prorl_nemo.training.saving import SaveFailed, Saver


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may catch it."""


def writer(text: str) -> BeginSave:
    """Stands for the ranks: the files appear when the save is finished, not when it begins."""

    def begin(folder: Path) -> FinishSave:
        def finish() -> None:
            (folder / "__0_0.distcp").write_text(text)
            (folder / "common.pt").write_text("common")

        return finish

    return begin


def save(checkpoints: Checkpoints, step: int, keep: int | None = None) -> SaveOutcome:
    checkpoints.begin(step, {"step": step}, writer(f"weights {step}"), keep)
    outcome = checkpoints.wait()
    assert outcome is not None
    return outcome


def whole(checkpoints: Checkpoints, step: int) -> bool:
    checkpoints.verify(step)
    policy = checkpoints.path(step) / "policy" / "__0_0.distcp"
    return checkpoints.read_state(step) == {"step": step} and policy.read_text().endswith(
        f"weights {step}"
    )


def test_saved_read_and_limited_in_number(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    assert checkpoints.steps() == []
    assert checkpoints.newest_whole() == (None, {})
    for step in (5, 10, 999_999, 1_000_000):
        outcome = save(checkpoints, step)
        assert (outcome.path, outcome.error) == (checkpoints.path(step), None)
        assert whole(checkpoints, step)
    # A number of seven digits sorts as a number.
    assert checkpoints.steps() == [999_999, 1_000_000]
    assert {p.name for p in checkpoints.folder.iterdir()} == {"step_999999", "step_1000000"}


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 7):
        save(checkpoints, step, keep=2 if step < 6 else 6)
    assert checkpoints.steps() == [4, 5, 6]
    save(checkpoints, 7, keep=4)
    # 4 was there still when it became the best; 5 is beyond the last two.
    assert checkpoints.steps() == [4, 6, 7]


def test_multiples_stay_for_good(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_every=4)
    for step in range(2, 15, 2):
        save(checkpoints, step)
    assert checkpoints.steps() == [4, 8, 12, 14]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    checkpoints.begin(5, {"step": 0}, writer("old"))
    save(checkpoints, 5)
    assert checkpoints.steps() == [5]
    assert whole(checkpoints, 5)


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for name in ("step_12", "step_000012.bak", "writing_000012", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoints.steps() == []
    save(checkpoints, 7)
    assert checkpoints.steps() == [7]
    assert (tmp_path / "notes").exists()
    assert not (tmp_path / "writing_000012").exists()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The state is that of the moment the save began, and no folder is there before it is whole."""
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    go_on = threading.Event()
    finish = writer("weights 3")(tmp_path / "writing_000003" / "policy")

    def begin(folder: Path) -> FinishSave:
        def slow() -> None:
            assert go_on.wait(30)
            finish()

        return slow

    state: dict[str, Any] = {"step": 3}
    checkpoints.begin(3, state, begin)
    state["step"] = 4
    assert checkpoints.take_outcome() is None
    assert checkpoints.saving_step == 3
    assert checkpoints.steps() == []
    go_on.set()
    outcome = checkpoints.wait()
    assert outcome is not None
    assert outcome.error is None
    assert checkpoints.wait() is None  # An outcome is told once.
    assert checkpoints.saving_step is None
    assert whole(checkpoints, 3)


# Fewer changes on disk than this are made by one save of the test below, so that all are tried.
MOMENTS = 26


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_killed_at_any_moment_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Die before the n-th change on disk, keeping at most two: what is listed is always whole, and
    the next save cleans up."""
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    calls, rmtree = 0, shutil.rmtree

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls > moment:
            raise Killed

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            count()
            return function(*args, **kwargs)

        return wrapped

    def rmtree_in_two_parts(path: Path, **options: Any) -> None:
        next(p for p in path.rglob("*") if p.is_file()).unlink()
        count()
        rmtree(path, **options)

    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "write_text"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        patch.setattr(run_state, "_flush", dying(run_state._flush))
        patch.setattr(shutil, "rmtree", rmtree_in_two_parts)
        try:
            save(checkpoints, 3)
        except Killed:
            survived = False
        else:
            survived = True
    assert survived or moment < MOMENTS - 1
    listed = Checkpoints(tmp_path, keep_last=2).steps()
    assert 2 in listed
    again = Checkpoints(tmp_path, keep_last=2)
    assert all(whole(again, step) for step in listed)
    save(again, 4)
    assert again.steps()[-1] == 4
    assert len(again.steps()) == 2
    assert len(list(tmp_path.iterdir())) == 2
    assert all(whole(again, step) for step in again.steps())


# ---- damage


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_any_flipped_bit_and_any_lost_byte_is_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    save(checkpoints, 3)
    path = checkpoints.path(3)
    assert {f.name for f in files_of(path)} == {
        "__0_0.distcp",
        "common.pt",
        "state.json",
        "manifest.json",
    }
    tried = 0
    for file in files_of(path):
        content = file.read_bytes()
        damages = [content[:-1], b"", content + b"\n" if file.name != "manifest.json" else b"{"]
        for place in range(len(content)):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            damages.append(bytes(flipped))
        for damage in damages:
            file.write_bytes(damage)
            if file.name == "manifest.json" and same_manifest(content, damage):
                continue
            with pytest.raises(
                DamagedCheckpoint, match=file.name.replace(".", r"\.") + "|manifest"
            ):
                checkpoints.verify(3)
            tried += 1
        file.unlink()
        with pytest.raises(DamagedCheckpoint, match="No such file"):
            checkpoints.verify(3)
        file.write_bytes(content)
    checkpoints.verify(3)
    assert tried > 400


def same_manifest(content: bytes, damage: bytes) -> bool:
    """A lost last newline, or white space that turned into other white space, says the same."""
    try:
        return bool(json.loads(damage) == json.loads(content))
    except ValueError:
        return False


def test_falls_back_to_the_newest_whole_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        save(checkpoints, step)
    (checkpoints.path(3) / "policy" / "common.pt").write_text("commom")
    (checkpoints.path(2) / "state.json").unlink()
    step, damaged = checkpoints.newest_whole()
    assert step == 1
    assert set(damaged) == {2, 3}
    assert "policy/common.pt: its SHA-256" in damaged[3]
    assert damaged[2].startswith("state.json: No such file")
    # Set aside, so that the steps done again are saved again; gone once one of them is.
    assert checkpoints.steps() == [1]
    assert (tmp_path / "damaged_000003").is_dir()
    save(checkpoints, 2)
    assert checkpoints.steps() == [1, 2]
    assert not list(tmp_path.glob("damaged_*"))


def test_a_run_never_starts_over_in_silence(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (1, 2):
        save(checkpoints, step)
        (checkpoints.path(step) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"none of .* can be used") as error:
        checkpoints.newest_whole()
    assert str(checkpoints.path(1)) in str(error.value)
    assert checkpoints.steps() == [1, 2]  # For whoever can mend them.


# ---- disks


def full(folder: Path) -> FinishSave:
    def finish() -> None:
        (folder / "__0_0.distcp").write_text("half a")
        raise OSError(errno.ENOSPC, "No space left on device")

    return finish


def test_a_full_disk_costs_the_checkpoint_and_leaves_the_earlier_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1)
    checkpoints.begin(2, {"step": 2}, full)
    outcome = checkpoints.wait()
    assert outcome is not None
    assert outcome.error is not None
    assert "No space left" in outcome.error
    assert checkpoints.steps() == [1]
    assert not list(tmp_path.glob("writing_*"))  # What fills the disk is taken away.
    assert whole(checkpoints, 1)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """/dev/full takes no byte, as the real thing."""
    checkpoints = Checkpoints(tmp_path, keep_last=1)

    def begin(folder: Path) -> FinishSave:
        (folder / "__0_0.distcp").symlink_to("/dev/full")

        def finish() -> None:
            with (folder / "__0_0.distcp").open("w") as file:
                file.write("weights")

        return finish

    checkpoints.begin(1, {"step": 1}, begin)
    outcome = checkpoints.wait()
    assert outcome is not None
    assert "No space left" in str(outcome.error)
    assert checkpoints.steps() == []


def test_a_folder_that_cannot_be_written_costs_the_checkpoint(tmp_path: Path) -> None:
    # A file where the folder should be: root may write into read-only folders.
    (tmp_path / "checkpoints").write_text("")
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=1)
    outcome = save(checkpoints, 1)
    assert outcome.error is not None


# ---- the saver: what the run is told


class Events(list[tuple[str, dict[str, Any]]]):
    def __call__(self, event: str, **details: Any) -> None:
        self.append((event, details))


def test_saver_logs_each_save_once_and_knows_what_it_costs(tmp_path: Path) -> None:
    events = Events()
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    saver = Saver(checkpoints, writer("weights"), background=True, on_event=events)
    assert saver.expected_seconds > 10  # Nothing known: rather too early than too late.
    saver.save(1, {"step": 1}, best=None)
    saver.collect(wait=True)
    saver.collect()
    saver.save(1, {"step": 1}, best=None, last=True)  # It is there: not written twice.
    assert [(name, e["saved_step"]) for name, e in events] == [("checkpoint_saved", 1)]
    assert saver.expected_seconds == pytest.approx(1.5 * events[0][1]["seconds"])
    later = Saver(checkpoints, writer("weights"), background=True, on_event=events)
    earlier = [{"event": "checkpoint_saved", "seconds": float(k)} for k in (500, *range(10, 20))]
    later.recall([{"event": "stopped"}, *earlier, {"event": "checkpoint_failed"}])
    assert later.expected_seconds == 1.5 * 19  # A resumed run: of the last ten.


def test_a_failed_save_is_an_event_and_at_the_end_an_error(tmp_path: Path) -> None:
    events = Events()
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    saver = Saver(checkpoints, full, background=False, on_event=events)
    saver.save(1, {"step": 1}, best=None)
    assert events[0][0] == "checkpoint_failed"
    assert "No space left" in events[0][1]["reason"]
    with pytest.raises(SaveFailed, match="No space left"):
        saver.save(2, {"step": 2}, best=None, last=True)
    assert [name for name, _ in events] == ["checkpoint_failed", "checkpoint_failed"]


def test_state_is_plain_json(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    state = {"step": 3, "prompts": {"queue": [[0, 1, 2]]}, "last_validation": None, "kl": 0.1}
    checkpoints.begin(3, state, writer(""))
    checkpoints.wait()
    assert checkpoints.read_state(3) == state
    assert os.path.getsize(checkpoints.path(3) / "manifest.json") > 0
