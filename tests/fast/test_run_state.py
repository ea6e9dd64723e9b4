"""Checkpoints: a folder named step_NNNNNN is whole, whenever the process was ended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prorl_nemo.errors import UserError
from prorl_nemo.training import run_state
from prorl_nemo.training.run_state import Checkpoints


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may catch it."""


def writer(text: str) -> Callable[[Path], None]:
    def save_policy(folder: Path) -> None:
        (folder / "rank_0.distcp").write_text(text)

    return save_policy


def whole(checkpoints: Checkpoints, step: int) -> bool:
    state = checkpoints.read_state(step)
    policy = checkpoints.path(step) / "policy" / "rank_0.distcp"
    return state == {"step": step} and policy.read_text() == f"weights {step}"


def save(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.save(step, {"step": step}, writer(f"weights {step}"))


def test_saved_read_and_limited_in_number(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    assert checkpoints.steps() == []
    for step in (5, 10, 999_999, 1_000_000):
        path = save(checkpoints, step)
        assert path == checkpoints.path(step)
        assert whole(checkpoints, step)
    # A number of seven digits sorts as a number.
    assert checkpoints.steps() == [999_999, 1_000_000]
    assert {p.name for p in checkpoints.folder.iterdir()} == {"step_999999", "step_1000000"}


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    checkpoints.save(5, {"step": 0}, writer("old"))
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


@pytest.mark.parametrize("moment", range(20))
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

    def rmtree_in_two_parts(path: Path) -> None:
        next(p for p in path.rglob("*") if p.is_file()).unlink()
        count()
        rmtree(path)

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
    assert survived or moment < 19  # There are fewer changes than that, so all were tried.
    listed = checkpoints.steps()
    assert 2 in listed
    assert all(whole(checkpoints, step) for step in listed)
    save(checkpoints, 4)
    assert checkpoints.steps()[-1] == 4
    assert len(checkpoints.steps()) == 2
    assert len(list(tmp_path.iterdir())) == 2
    assert all(whole(checkpoints, step) for step in checkpoints.steps())


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1)

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(2, {"step": 2}, full)
    assert checkpoints.steps() == [1]
    assert whole(checkpoints, 1)


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "\xff"])
def test_a_damaged_state_is_named_with_the_way_out(tmp_path: Path, content: str | None) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    path = save(checkpoints, 3) / "state.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        checkpoints.read_state(3)
    assert str(path) in str(error.value)
    assert f"delete {path.parent} to resume from the one before" in str(error.value)


def test_state_is_plain_json(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    state = {"step": 3, "prompts": {"queue": [[0, 1, 2]]}, "last_validation": None, "kl": 0.1}
    checkpoints.save(3, state, writer(""))
    assert checkpoints.read_state(3) == state
    assert json.loads((checkpoints.path(3) / "state.json").read_text()) == state
