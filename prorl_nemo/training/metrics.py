"""The run's diary: metrics, events and samples as JSON lines that survive being killed.

Our choice: plain append-only files, because a run of weeks outlives any tracking
service and its figures must be readable with `jq` or pandas. A row is written in
one call, so a crash can damage the last line only; that line is passed over when
reading and cut before the next append. A full disk costs rows, never the run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prorl_nemo.errors import UserError

logger = logging.getLogger(__name__)

Row = dict[str, Any]

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"

# What happened to the process rather than to the policy: stays true, and in the
# diary, when the steps around it are lost and done again.
PROCESS_EVENTS = frozenset(
    {
        "run_started",
        "resumed",
        "recipe_changed",
        "restarted",
        "sandbox",
        "stopped",
        "finished",
        "engine_restarted",
        "checkpoint_damaged",
        "checkpoint_failed",
        "figures_missing",
        "rows_lost",
    }
)

_SAMPLES_NAME = re.compile(r"step_(\d+)\.jsonl")


class RunFileError(UserError):
    """A file of the run directory is damaged in a way no crash explains."""


class RunLog:
    """Writes metrics.jsonl, events.jsonl and samples/ of one run directory.

    Opening mends what a crash left behind. Writing never raises for want of
    disk: the first lost row is logged as a warning, all are counted.

    Attributes:
        lost_rows: rows that could not be written so far.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = Path(run_dir)
        self.lost_rows = 0
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = _Appender(self.run_dir / METRICS)
        self._events = _Appender(self.run_dir / EVENTS)

    def metrics(self, row: Mapping[str, Any]) -> Row:
        """Append one row; `kind` (train, validation) and `step` are required, `time` is filled in.

        Returns the row as written: plain values, NaN and infinity as None.
        """
        if row.get("kind") not in ("train", "validation") or not isinstance(row.get("step"), int):
            raise ValueError(f"a metrics row needs kind and step, found {sorted(row)}")
        return self._append(self._metrics, {"time": time.time(), **row})

    def event(self, event: str, step: int, **details: Any) -> Row:
        """Append one event and return it. `step` is the step it belongs to: the one just done
        for a reset or a checkpoint, the one about to begin for a stage."""
        return self._append(
            self._events, {"time": time.time(), "step": step, "event": event, **details}
        )

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the samples of a step, replacing an earlier file of the same step."""
        lines = [_encode(plain(row)) for row in rows]
        path = samples_path(self.run_dir, step)

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            replace_file(path, lines, durable=False)

        self._guard(write, path, len(lines))

    def truncate_after(self, step: int) -> int:
        """Forget everything later than `step`, because training resumes from its checkpoint.

        Events of the process (`PROCESS_EVENTS`) stay. Returns the number of metrics rows
        dropped. Unlike the writers this raises OSError: it runs before any training.
        """
        dropped = self._metrics.keep(lambda row: not _later(row, step))
        self._events.keep(lambda row: not _later(row, step) or row.get("event") in PROCESS_EVENTS)
        for later in sample_steps(self.run_dir):
            if later > step:
                samples_path(self.run_dir, later).unlink()
        return dropped

    def flushed_sizes(self) -> dict[str, int]:
        """Bytes of each file, after bringing them to the disk: a checkpoint must not outlive, on a
        loss of power, the figures of the steps before it."""
        return {file.path.name: file.flush() for file in (self._metrics, self._events)}

    def shorter_than(self, sizes: Mapping[str, int]) -> list[str]:
        """Files that have lost what `flushed_sizes` had counted."""
        found = {file.path.name: file.end for file in (self._metrics, self._events)}
        return [name for name, size in sizes.items() if found.get(name, 0) < size]

    def close(self) -> None:
        self._metrics.close()
        self._events.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _append(self, file: _Appender, row: Mapping[str, Any]) -> Row:
        written: Row = plain(row)
        line = _encode(written)
        self._guard(lambda: file.append(line), file.path, 1)
        return written

    def _guard(self, write: Callable[[], None], path: Path, rows: int) -> None:
        try:
            write()
        except OSError as error:
            if not self.lost_rows:
                logger.warning("%s: a row is lost (%s); training goes on without it", path, error)
            self.lost_rows += rows


class _Appender:
    """An append-only file of whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def append(self, line: bytes) -> None:
        """Write one line, or nothing: what a full disk cut short is taken back."""
        view = memoryview(line)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._end)
            raise
        self._end += len(line)

    def keep(self, wanted: Callable[[Row], bool]) -> int:
        """Rewrite the file with the rows `wanted` accepts; returns how many were dropped."""
        rows = read_rows(self.path)
        kept = [row for row in rows if wanted(row)]
        if len(kept) < len(rows):
            self.close()
            replace_file(self.path, [_encode(row) for row in kept])
            self._open()
        return len(rows) - len(kept)

    @property
    def end(self) -> int:
        """Bytes of whole lines."""
        return self._end

    def flush(self) -> int:
        """Bring the file to the disk; its size in bytes."""
        with suppress(OSError):  # A disk that fails here fails the checkpoint too, and says so.
            os.fsync(self._file.fileno())
        return self._end

    def close(self) -> None:
        self._file.close()

    def _open(self) -> None:
        _mend(self.path)
        # Unbuffered: one write call a line, nothing left in the process to lose.
        self._file = self.path.open("ab", buffering=0)
        self._end = self.path.stat().st_size


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSON-lines file; none if it does not exist. See `iter_rows`."""
    return list(iter_rows(path))


def iter_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON-lines file, one at a time; a damaged last line is passed over.

    Raises:
        RunFileError: a line that is not the last is not a JSON object; names the line.
    """
    if not path.exists():
        return
    damaged = 0
    with path.open("rb") as file:
        for at, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if damaged:
                raise RunFileError(
                    f"{path}, line {damaged}: not a JSON object, and not the last line, so no "
                    "crash explains it; restore the file or delete that line"
                )
            row = _parse(line)
            if row is None:
                damaged = at
            else:
                yield row


def samples_path(run_dir: Path, step: int) -> Path:
    """Where the samples of a step lie."""
    return run_dir / "samples" / f"step_{step:06d}.jsonl"


def sample_steps(run_dir: Path) -> list[int]:
    """Steps whose samples were kept, ascending."""
    found = (_SAMPLES_NAME.fullmatch(path.name) for path in (run_dir / "samples").glob("step_*"))
    return sorted(int(match[1]) for match in found if match)


def number(value: Any) -> float | None:
    """A figure of a row if it is a finite number that a float can hold, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with suppress(OverflowError):  # an int beyond float's range
        return value if math.isfinite(value) else None
    return None


def plain(value: Any) -> Any:
    """JSON's types only: arrays and tensors of one element become numbers, NaN becomes None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"cannot be written to the run's diary: {type(value).__name__}")


def _later(row: Row, step: int) -> bool:
    found = row.get("step")
    return isinstance(found, int) and found > step


def _encode(value: Any) -> bytes:
    # ASCII, because model text may hold lone surrogates, which UTF-8 cannot carry.
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _mend(path: Path) -> None:
    """Leave whole lines: cut a last line that is no JSON object, end one that lacks its newline."""
    if not path.exists():
        return
    data = path.read_bytes()
    start = data.rstrip(b"\n").rfind(b"\n") + 1
    last = data[start:].strip()
    if last and _parse(last) is None:
        os.truncate(path, start)
    elif not data.endswith(b"\n") and data:
        with path.open("ab") as file:
            file.write(b"\n")


def replace_file(path: Path, lines: Iterable[bytes], durable: bool = True) -> None:
    """Write a file aside, then rename: a crash leaves the old one or the new one. Durable: so does
    a loss of power, at the price of waiting for the disk."""
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            file.writelines(lines)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
