"""Checkpoints: whole or absent, checked by their sums, written while training goes on.

A checkpoint is a folder `step_NNNNNN` with `policy/` (Megatron's sharded files: policy,
optimizer, reference, random state), `state.json` (everything else) and `manifest.json`
(size and SHA-256 of each file). It is written under another name, flushed to disk and renamed,
so a folder of that name is always whole; what happens to it on disk later is found by its sums.

Our choice: the tensors are copied while training stands still, and written behind its back. A
save that fails costs that checkpoint, never the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prorl_nemo.errors import UserError

_NAME = re.compile(r"step_(\d{6,})")
MANIFEST = "manifest.json"
STATE = "state.json"

FinishSave = Callable[[], None]
"""Returns when the policy's files are written. Raises whatever went wrong."""

BeginSave = Callable[[Path], FinishSave]
"""Copies the policy's tensors and starts to write them into an empty folder."""


class DamagedCheckpoint(Exception):
    """A file is missing, truncated or altered. The message says which and how."""


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended.

    Attributes:
        seconds: from its start to the renamed folder.
        error: None if the checkpoint is there.
    """

    step: int
    path: Path
    seconds: float
    error: str | None = None


class Checkpoints:
    """The checkpoints of one run directory. One is written at a time.

    Args:
        folder: `checkpoints/` of the run.
        keep_last: older ones beyond this number are deleted after a new one is whole.
        keep_every: but not those of multiples of this step.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int | None = None) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[SaveOutcome] | None = None
        self._saving_step: int | None = None

    # ---- reading --------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in increasing order; one being written is not there."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def verify(self, step: int) -> None:
        """Compare every file with the manifest. Reads the whole checkpoint.

        Raises:
            DamagedCheckpoint: naming the first file that is not as it was written.
        """
        path = self.path(step)
        body = _read_manifest(path)
        if body["step"] != step:
            raise DamagedCheckpoint(f"{MANIFEST} is of step {body['step']}")
        for name, written in body["files"].items():
            file = path / name
            try:
                size = file.stat().st_size
                if size != written["bytes"]:
                    raise DamagedCheckpoint(f"{name}: {size} bytes, {written['bytes']} written")
                if _sha256(file) != written["sha256"]:
                    raise DamagedCheckpoint(f"{name}: its SHA-256 is not that of the manifest")
            except OSError as error:
                raise DamagedCheckpoint(f"{name}: {error.strerror}") from None

    def newest_whole(self) -> tuple[int | None, dict[int, str]]:
        """The newest checkpoint that is as it was written.

        Returns:
            its step, or None without any checkpoint; and why newer ones are not used, by step.
            Those are renamed `damaged_NNNNNN`, and deleted after the next save.

        Raises:
            UserError: there are checkpoints, and all are damaged. Nothing is renamed.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                self.verify(step)
            except DamagedCheckpoint as reason:
                damaged[step] = str(reason)
                continue
            for other in damaged:
                with suppress(OSError):
                    self._set_aside(other, "damaged")
            return step, damaged
        if damaged:
            listed = "\n  ".join(f"{self.path(step)}: {why}" for step, why in damaged.items())
            raise UserError(
                f"checkpoints: none of {self.folder} can be used; restore one from a copy, or "
                f"delete them all to start again from step 0\n  {listed}"
            )
        return None, damaged

    def read_state(self, step: int) -> dict[str, Any]:
        """The `state.json` of a checkpoint. Raises DamagedCheckpoint."""
        try:
            state: dict[str, Any] = json.loads((self.path(step) / STATE).read_text())
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"{STATE}: cannot be read ({error})") from None
        return state

    # ---- writing --------------------------------------------------------------------------

    def begin(
        self, step: int, state: dict[str, Any], save_policy: BeginSave, keep: int | None = None
    ) -> None:
        """Start the checkpoint of a finished step; `take_outcome` or `wait` tell how it ended.

        Waits for the save before it. Returns as soon as all tensors are copied.

        Args:
            state: JSON-able; turned into text before this returns.
            keep: a step whose checkpoint must not be deleted (the best so far).
        """
        if self._saving is not None:
            self._saving.exception()  # Its outcome is lost; callers take it before.
        started = time.monotonic()
        text = json.dumps(state)
        aside = self.folder / f"writing_{step:06d}"
        try:
            self._make_room(aside)
            finish = save_policy(aside / "policy")
        except Exception as error:
            # A disk that is full or read-only costs this checkpoint, not the run.
            self._saving = Future()
            self._saving.set_result(self._failed(step, started, error))
            return
        self._saving_step = step
        self._saving = self._writer.submit(self._finish, step, text, finish, keep, started)

    def take_outcome(self) -> SaveOutcome | None:
        """The outcome of a save that has ended since the last call, once."""
        if self._saving is None or not self._saving.done():
            return None
        return self.wait()

    def wait(self) -> SaveOutcome | None:
        """Wait for a save under way; None if there is none."""
        if self._saving is None:
            return None
        outcome = self._saving.result()
        self._saving, self._saving_step = None, None
        return outcome

    @property
    def saving_step(self) -> int | None:
        """The step whose checkpoint is being written."""
        return self._saving_step

    def close(self) -> None:
        """Wait for the writer; a save under way is finished."""
        self._writer.shutdown()

    def _make_room(self, aside: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind in ("writing", "deleting"):
            for leftover in self.folder.glob(f"{kind}_*"):
                shutil.rmtree(leftover)
        (aside / "policy").mkdir(parents=True)

    def _finish(
        self, step: int, state: str, finish: FinishSave, keep: int | None, started: float
    ) -> SaveOutcome:
        """On the writer's thread: the rest of the files, the sums, the new name."""
        aside = self.folder / f"writing_{step:06d}"
        try:
            finish()
            (aside / STATE).write_text(state)
            _write_manifest(aside, step)
            for file in [*aside.rglob("*"), aside]:
                _flush(file)
            self._delete(step)
            aside.rename(self.path(step))
            _flush(self.folder)
            self._prune(keep)
        except Exception as error:
            return self._failed(step, started, error)
        return SaveOutcome(step, self.path(step), time.monotonic() - started)

    def _failed(self, step: int, started: float, error: Exception) -> SaveOutcome:
        # What was written fills a disk that may be full.
        shutil.rmtree(self.folder / f"writing_{step:06d}", ignore_errors=True)
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:500]
        return SaveOutcome(step, self.path(step), time.monotonic() - started, reason)

    def _prune(self, keep: int | None) -> None:
        every = self.keep_every
        others = [step for step in self.steps() if step != keep]
        for step in others[: -self.keep_last]:
            if every is None or step % every:
                self._delete(step)
        for damaged in self.folder.glob("damaged_*"):
            shutil.rmtree(damaged)

    def _delete(self, step: int) -> None:
        """Rename first: a process killed while it deletes must not leave half a checkpoint."""
        if self.path(step).exists():
            shutil.rmtree(self._set_aside(step, "deleting"))

    def _set_aside(self, step: int, kind: str) -> Path:
        aside = self.folder / f"{kind}_{step:06d}"
        if aside.exists():
            shutil.rmtree(aside)
        self.path(step).rename(aside)
        return aside


def _write_manifest(folder: Path, step: int) -> None:
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    body = {"step": step, "files": files}
    manifest = {"body": body, "sha256": _text_sha256(body)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        body: dict[str, Any] = manifest["body"]
        if manifest["sha256"] != _text_sha256(body):
            raise DamagedCheckpoint(f"{MANIFEST}: altered")
    except OSError as error:
        raise DamagedCheckpoint(f"{MANIFEST}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{MANIFEST}: cannot be read ({error})") from None
    return body


def _text_sha256(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
