"""What a run remembers besides the trainer's tensors, and the checkpoints that hold both.

A checkpoint is a folder `step_NNNNNN` with `policy/` (Megatron's sharded files:
policy, optimizer, reference) and `state.json`. It is written under another name,
flushed to disk and renamed, so a folder of that name is always whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prorl_nemo.errors import UserError

_NAME = re.compile(r"step_(\d{6,})")


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        folder: `checkpoints/` of the run.
        keep_last: older ones beyond this number are deleted after a new one is whole.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder, self.keep_last = folder, keep_last

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in increasing order."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def save(self, step: int, state: dict[str, Any], save_policy: Callable[[Path], None]) -> Path:
        """Write the checkpoint of a finished step. Returns its folder.

        Raises:
            OSError: nothing was changed but perhaps a folder `writing_...` or `deleting_...` is
                left, which the next save removes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in [*self.folder.glob("writing_*"), *self.folder.glob("deleting_*")]:
            shutil.rmtree(leftover)
        aside = self.folder / f"writing_{step:06d}"
        (aside / "policy").mkdir(parents=True)
        save_policy(aside / "policy")
        (aside / "state.json").write_text(json.dumps(state))
        for file in [*aside.rglob("*"), aside]:
            _flush(file)
        self._delete(step)
        aside.rename(self.path(step))
        _flush(self.folder)
        for old in self.steps()[: -self.keep_last]:
            self._delete(old)
        return self.path(step)

    def _delete(self, step: int) -> None:
        """Rename first: a process killed while it deletes must not leave half a checkpoint."""
        if self.path(step).exists():
            aside = self.folder / f"deleting_{step:06d}"
            self.path(step).rename(aside)
            shutil.rmtree(aside)

    def read_state(self, step: int) -> dict[str, Any]:
        """The `state.json` of a checkpoint. Raises UserError if it is damaged."""
        path = self.path(step) / "state.json"
        try:
            state: dict[str, Any] = json.loads(path.read_text())
            if not isinstance(state, dict):
                raise ValueError("not a JSON object")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: damaged ({error}); delete {path.parent} to resume from the one before"
            ) from None
        return state


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
