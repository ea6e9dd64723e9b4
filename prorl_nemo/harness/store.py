"""An evaluation's folder: what was asked, every sample, and the figures.

    evaluation.json    the manifest: all that the numbers depend on; must be the same on resume
    items.jsonl        the items, so that samples can be graded again without their data
    samples.jsonl      every sample with prompt, response, tokens, seed, verdict and reason
    generated.jsonl    responses that are not graded yet; gone at the end
    results.json, results.md, results.html

Our choice: a response is written when it arrives and once more when it is graded. So a process
that is killed at any moment generates nothing twice, and a slow grader loses no GPU hours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from prorl_nemo import folder_lock
from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.sample_file import SampleFile, read_rows
from prorl_nemo.evaluation.suite import Suite, changed_lines, stored_suite

MANIFEST, ITEMS, SAMPLES, GENERATED = (
    "evaluation.json", "items.jsonl", "samples.jsonl", "generated.jsonl",
)  # fmt: skip


class Store:
    """An open folder of an evaluation that goes on.

    Attributes:
        samples: graded.
        ungraded: rows that were generated and not graded before this start.
        repaired: bytes of torn lines that were cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples = SampleFile(folder / SAMPLES)
        try:
            self._generated = SampleFile(folder / GENERATED)
            self.repaired = self.samples.repaired + self._generated.repaired
            rows = self._generated.rows()
            self.ungraded = [row for row in rows if (row["item"], row["sample"]) not in self]
        except BaseException:
            self.samples.close()
            raise

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self.samples

    def generated(self, row: dict[str, Any]) -> None:
        """Keep a response that has arrived."""
        self._generated.append(row)

    def graded(self, row: dict[str, Any]) -> None:
        """Keep a response with its verdict."""
        self.samples.append(row)

    def finish(self) -> None:
        """Everything is graded: what is in `samples.jsonl` is all there is."""
        self.close()
        (self.folder / GENERATED).unlink()

    def close(self) -> None:
        self._generated.close()
        self.samples.close()


@contextmanager
def open_store(folder: Path, suite: Suite, manifest: dict[str, Any]) -> Iterator[Store]:
    """The folder, made or resumed, and held until the end.

    Args:
        manifest: `Suite.manifest` of what is asked now.

    Raises:
        UserError: not writable, in use, of another evaluation, or damaged.
    """
    with ExitStack() as stack:
        stack.enter_context(locked(folder))
        if (folder / MANIFEST).exists():
            changes = changed_lines(read_manifest(folder), manifest)
            if changes:
                more = [f"and {len(changes) - 8} more"] if len(changes) > 8 else []
                raise UserError(
                    f"--out: {folder} holds another evaluation; give another folder\n  "
                    + "\n  ".join(changes[:8] + more)
                )
        elif (folder / SAMPLES).exists():
            raise UserError(f"--out: {folder} holds samples of an unknown evaluation")
        else:
            records = (json.dumps(record) + "\n" for record in suite.item_records())
            replace_file(folder / ITEMS, records)
            replace_file(folder / MANIFEST, [json.dumps(manifest, indent=1) + "\n"])
        store = Store(folder)
        stack.callback(store.close)
        yield store


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes. Raises UserError if one keeps it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be written ({error.strerror})") from None
    with file:
        try:
            folder_lock.take(
                file, f"--out: {folder}", "wait for its end, stop it, or give another folder"
            )
            folder_lock.sign(file)
        except OSError as error:
            raise UserError(
                f"--out: {folder} cannot be locked ({error.strerror}), so two processes could "
                "ruin it; give another folder"
            ) from None
        yield


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an evaluation's folder. Raises UserError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no folder of an evaluation (it has no {MANIFEST})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST}: cannot be read ({error})") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{folder / MANIFEST}: must hold a JSON object")
    return manifest


def read_store(folder: Path) -> tuple[dict[str, Any], Suite]:
    """Manifest and suite of an evaluation's folder. Raises UserError."""
    manifest = read_manifest(folder)
    try:
        with (folder / ITEMS).open(encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / ITEMS}: cannot be read ({error})") from None
    return manifest, stored_suite(manifest, records)


def sample_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The graded samples of a folder. Raises UserError."""
    if not (folder / SAMPLES).exists():
        raise UserError(f"{folder}: holds no samples yet")
    return read_rows(folder / SAMPLES)


def replace_file(path: Path, parts: Any) -> None:
    """Write a file aside and rename it, so that it is whole or not there."""
    aside = path.with_name(f"{path.name}.part")
    try:
        with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
