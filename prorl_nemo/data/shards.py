"""Built data on disk: Parquet shards, and a manifest that says what is in them and whence.

    <folder>/manifest.json                        written last: without it there is no data
    <folder>/<domain>-<split>-NNNNN-<hash>.parquet

A shard's name holds the start of its hash, so that a build that is interrupted leaves the data of
the build before it as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prorl_nemo.data.record import Record
from prorl_nemo.data.row_files import sha256
from prorl_nemo.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("record_id", "domain", "task", "problem", "grading")]
)
# Small groups: a prompt is read by its group, and drawing is in random order.
_GROUP_ROWS, _GROUP_BYTES = 256, 1 << 20
_SHARD_BYTES = 256 << 20


class RecordWriter:
    """Writes records to one Parquet file; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = self.bytes = 0
        self._writer = pq.ParquetWriter(path, _SCHEMA, compression="zstd")
        self._group: list[dict[str, str]] = []
        self._group_bytes = 0

    def write(self, record: Record) -> None:
        row = {
            "record_id": record.record_id,
            "domain": record.domain,
            "task": record.task,
            "problem": record.problem,
            "grading": json.dumps(record.grading),
        }
        self._group.append(row)
        size = len(row["problem"]) + len(row["grading"])
        self._group_bytes += size
        self.bytes += size
        self.rows += 1
        if len(self._group) >= _GROUP_ROWS or self._group_bytes >= _GROUP_BYTES:
            self._flush()

    @property
    def full(self) -> bool:
        return self.bytes >= _SHARD_BYTES

    def _flush(self) -> None:
        if self._group:
            self._writer.write_table(pa.Table.from_pylist(self._group, schema=_SCHEMA))
            self._group, self._group_bytes = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def record_of(row: dict[str, str]) -> Record:
    """The inverse of `RecordWriter.write`."""
    grading = json.loads(row["grading"])
    return Record(row["record_id"], row["domain"], row["task"], row["problem"], grading)


class ShardWriter:
    """Writes one domain's split into shards of bounded size."""

    def __init__(self, folder: Path, domain: str, split: str) -> None:
        self._folder, self._domain, self._split = folder, domain, split
        self._writer: RecordWriter | None = None
        self.shards: list[dict[str, Any]] = []

    def write(self, record: Record) -> None:
        if self._writer is None:
            self._writer = RecordWriter(self._folder / f".{self._domain}-{self._split}.writing")
        self._writer.write(record)
        if self._writer.full:
            self.close()

    def close(self) -> None:
        """Give the shard under way its name. Nothing happens without one."""
        if self._writer is None:
            return
        self._writer.close()
        digest = sha256(self._writer.path)
        number = len(self.shards)
        name = f"{self._domain}-{self._split}-{number:05d}-{digest[:12]}.parquet"
        os.replace(self._writer.path, self._folder / name)
        self.shards.append(
            {
                "file": name,
                "domain": self._domain,
                "split": self._split,
                "rows": self._writer.rows,
                "sha256": digest,
            }
        )
        self._writer = None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Put a manifest in force, then delete the shards that it does not name."""
    path = folder / f".{MANIFEST}.writing"
    with path.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(path, folder / MANIFEST)
    named = {shard["file"] for shard in manifest["shards"]}
    for shard in folder.glob("*.parquet"):
        if shard.name not in named:
            shard.unlink()


def read_manifest(folder: Path, key: str) -> dict[str, Any]:
    """The manifest of a built folder.

    Raises:
        UserError: nothing built there, or by another version; `key` is where the recipe says so.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{key}: {path} has format {manifest['format']}; build the data again")
    except FileNotFoundError:
        raise UserError(f"{key}: {folder} holds no built data; run prorl data build") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key}: {path} cannot be read ({error}); build the data again") from None
    found: dict[str, Any] = manifest
    return found


def check_shards(folder: Path, shards: Iterable[dict[str, Any]], key: str) -> None:
    """Refuse shards that are not what the manifest says. Reads all of them."""
    for shard in shards:
        path = folder / shard["file"]
        if not path.is_file() or sha256(path) != shard["sha256"]:
            raise UserError(
                f"{key}: {path} is missing or has changed since it was built; build again"
            )
