"""An append-only file of samples that survives being killed: one JSON object a line.

Our choice. A row is written whole and handed to the system at once, so a process that is killed
leaves at most one torn line, the last, which the next start cuts off. Each (item, sample) is there
once or not at all: what is there is neither generated nor counted again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from prorl_nemo.errors import UserError

Key = tuple[str, int]
"""Item id, and index of the sample: what a row is the row of."""


class SampleFile:
    """Rows keyed by `item` and `sample`. Use as a context manager or call `close`.

    Attributes:
        repaired: bytes of a torn last line that were cut off.

    Raises:
        UserError: it cannot be read or written, a line other than the last is damaged, or a
            sample is there twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.repaired = _cut_torn_line(path)
            # Unbuffered: what could not be written must not come again behind a torn line.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            self._keys: set[Key] = set()
            for row in self.rows():
                self._take(row)
        except ValueError as error:
            self._file.close()
            raise UserError(f"{error}; delete one of the two lines") from None
        except BaseException:
            self._file.close()
            raise

    def __contains__(self, key: Key) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def append(self, row: dict[str, Any]) -> None:
        """Write a row; when this returns, ending the process does not lose it.

        Raises:
            ValueError: the sample is there already.
            UserError: the disk is full, or the file cannot be written.
        """
        self._take(row)
        line = memoryview(json.dumps(row, separators=(",", ":")).encode() + b"\n")
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            # Half a line may be there: nothing may follow it.
            self._file.close()
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); what was written is kept: "
                "make room, and give the same command again"
            ) from None

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, in the order in which they were written."""
        return read_rows(self.path)

    def close(self) -> None:
        """Close, with everything on the disk."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _take(self, row: dict[str, Any]) -> None:
        key = (row["item"], row["sample"])
        if key in self._keys:
            raise ValueError(f"{self.path}: sample {key[1]} of {key[0]} is there twice")
        self._keys.add(key)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a sample file, one at a time: it may be larger than memory.

    Raises:
        UserError: naming the file and line that is damaged.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                whole = isinstance(row["item"], str) and type(row["sample"]) is int
            except (ValueError, RecursionError, KeyError, TypeError):
                whole = False
            if not whole:
                raise UserError(
                    f"{path}, line {number}: damaged; restore the file, or delete that line to "
                    "have its sample made again"
                )
            yield row


def _cut_torn_line(path: Path) -> int:
    """End the file with its last whole line; returns how many bytes were cut off."""
    with path.open("ab+") as file:
        size = end = file.tell()
        while end:
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
    return size - end
