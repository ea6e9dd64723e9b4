"""Rows of data files: JSON lines, JSON lists and Parquet, each row with its number.

A line that cannot be read is a bad row, not the end of the file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from prorl_nemo.data.record import BadRowError
from prorl_nemo.errors import UserError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
# A code problem's tests may take tens of megabytes; more than this is not a row.
_LONGEST_LINE = 256 << 20


def data_files(path: Path, patterns: tuple[str, ...] = ()) -> list[Path]:
    """The data files at `path`: itself, or what matches in the folder, in the order of names.

    Args:
        patterns: as in a hub repository, e.g. `data/train-*.parquet`. A file matches with or
            without the pattern's folders. Empty: every data file.

    Raises:
        UserError: nothing there.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder")
    found = [f for f in sorted(path.rglob("*")) if f.name.endswith(SUFFIXES) and f.is_file()]
    if patterns:
        names = {pattern.rpartition("/")[2] for pattern in patterns}
        found = [f for f in found if any(f.match(name) for name in names)]
    if not found:
        wanted = f" like {' or '.join(patterns)}" if patterns else ""
        raise UserError(f"{path}: holds no data file{wanted} ({', '.join(SUFFIXES)})")
    return found


def rows(path: Path) -> Iterator[tuple[int, Row | BadRowError]]:
    """(number from 1, row) for each row of a file; what is wrong in the place of a bad one.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
            return
        with _open(path) as file:
            start = file.read(64).lstrip()
            file.seek(0)
            yield from _array(file) if start.startswith(b"[") else _lines(file)
    except (OSError, EOFError, pa.ArrowException, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {str(error)[:300]}") from None


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _lines(file: IO[bytes]) -> Iterator[tuple[int, Row | BadRowError]]:
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                continue
            yield number, BadRowError(f"the line has more than {_LONGEST_LINE >> 20} MiB")
        elif line.strip():
            yield number, _row(line)


def _row(line: bytes) -> Row | BadRowError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRowError(f"not JSON: {error}")
    return row if isinstance(row, dict) else BadRowError("not an object")


def _array(file: IO[bytes]) -> Iterator[tuple[int, Row | BadRowError]]:
    try:
        found = json.load(file)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    for number, row in enumerate(found, start=1):
        yield number, row if isinstance(row, dict) else BadRowError("not an object")


def _parquet(path: Path) -> Iterator[tuple[int, Row | BadRowError]]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def sha256(path: Path) -> str:
    """Hash of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
