"""One file of a public data set, read into records, checked, and kept for the next build."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prorl_nemo.data.public_sources import SOURCES, PublicSource, Reading
from prorl_nemo.data.record import BadRowError, Record, SkippedRow, check
from prorl_nemo.data.row_files import data_files, rows, sha256
from prorl_nemo.data.shards import RecordWriter, record_of
from prorl_nemo.errors import RecipeError
from prorl_nemo.recipe_data import BuildSource
from prorl_nemo.rewards.pool import GraderPool

# Raised when reading changes, so that parts of an older version are not used.
_VERSION = 1
_LISTED = 1000  # bad rows kept with their reasons
_BATCH = 512  # rows whose agreement is graded together


@dataclass
class Part:
    """Records of one file.

    Attributes:
        records: iterates over (split or None, record), again at each call.
        counts: rows read, left out by rule, bad, ...
        bad_rows: (number in the file, reason) of the first ones.
        file: its name; empty for generated records.
    """

    records: Callable[[], Iterator[tuple[str | None, Record]]]
    counts: dict[str, int] = field(default_factory=dict)
    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    file: str = ""


def read_source(
    settings: BuildSource,
    folder: Path,
    *,
    key: str,
    max_bad_share: float,
    on_row: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Any], list[Part]]:
    """Read all files of a source.

    Args:
        folder: where parts are kept.
        key: where the recipe speaks of the source.
        on_row: called for every row that is read.

    Returns:
        What the manifest says of the source, and a part for each file.

    Raises:
        RecipeError: it cannot be downloaded, or a file has too many bad rows.
        UserError: a file is missing or cannot be read.
    """
    source = SOURCES[settings.source]
    root = Path(settings.path).expanduser() if settings.path else _download(source, settings, key)
    about: dict[str, Any] = {
        "source": source.name,
        "repository": source.repository,
        "licence": source.licence,
        "files": [],
    }
    if not settings.path:
        about["revision"] = root.name  # The hub's cache names a snapshot by its commit.
    parts = []
    for file in data_files(root, source.files):
        digest = sha256(file)
        about["files"].append({"name": file.name, "sha256": digest})
        identity = hashlib.sha256(f"{_VERSION} {source.name} {digest}".encode()).hexdigest()[:16]
        part = _part(source, file, folder / f"{source.name}-{identity}", on_row)
        _refuse_bad(part, file, key, max_bad_share)
        parts.append(part)
    return about, parts


def _refuse_bad(part: Part, file: Path, key: str, max_bad_share: float) -> None:
    bad, read = part.counts.get("bad_rows", 0), part.counts["rows"]
    if read == 0:
        raise RecipeError(f"{key}: {file} has no rows")
    if bad > max_bad_share * read:
        shown = "\n  ".join(f"row {line}: {reason}" for line, reason in part.bad_rows[:3])
        raise RecipeError(
            f"{key}: {bad} of {read} rows of {file} cannot be used, more than "
            f"data.build.max_bad_share ({max_bad_share:g}) allows; is it the right data set?\n"
            f"  {shown}"
        )


def _download(source: PublicSource, settings: BuildSource, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(
            snapshot_download(
                source.repository,
                repo_type="dataset",
                revision=settings.revision,
                allow_patterns=list(source.files),
            )
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise RecipeError(
            f"{key}: {source.repository} cannot be downloaded ({reason}); download it elsewhere "
            f"and give its folder as {key}.path"
        ) from None


def _part(source: PublicSource, file: Path, stem: Path, on_row: Callable[[], object]) -> Part:
    """The part of a file: the one that is there, or a new one."""
    data, facts = stem.with_suffix(".parquet"), stem.with_suffix(".json")
    if not facts.exists():
        stem.parent.mkdir(parents=True, exist_ok=True)
        found = _make(source, file, data, on_row)
        writing = facts.with_suffix(".writing")
        writing.write_text(json.dumps(found), encoding="utf-8")
        os.replace(writing, facts)  # Last: a part without its facts is made again.
    found = json.loads(facts.read_text(encoding="utf-8"))
    bad = [(line, reason) for line, reason in found["bad_rows"]]
    return Part(lambda: _records(data), found["counts"], bad, file.name)


def _records(data: Path) -> Iterator[tuple[str | None, Record]]:
    for _, row in rows(data):
        assert not isinstance(row, BadRowError)
        yield None, record_of(row)


def _make(
    source: PublicSource, file: Path, data: Path, on_row: Callable[[], object]
) -> dict[str, Any]:
    counts: Counter[str] = Counter(rows=0)
    bad_rows: list[tuple[int, str]] = []
    # Files with the same row many times over are common; across files `build` looks again.
    seen: set[str] = set()
    with RecordWriter(data) as writer, _Agreement() as agreement:

        def take(decided: list[tuple[bool, Record]]) -> None:
            for agreed, record in decided:
                if not agreed:
                    counts["left out: no agreement"] += 1
                elif record.digest in seen:
                    counts["duplicates"] += 1
                else:
                    seen.add(record.digest)
                    writer.write(record)

        for number, row in rows(file):
            counts["rows"] += 1
            on_row()
            try:
                if isinstance(row, BadRowError):
                    raise row
                record, reading = read_row(source, row, f"{source.name}/{file.name}/{number}")
            except SkippedRow as reason:
                counts[f"left out: {reason}"] += 1
            except BadRowError as reason:
                counts["bad_rows"] += 1
                if len(bad_rows) < _LISTED:
                    bad_rows.append((number, str(reason)[:300]))
            else:
                take(agreement.add(record, reading))
        take(agreement.finish())
    return {"counts": dict(counts), "bad_rows": bad_rows}


def read_row(source: PublicSource, row: dict[str, Any], record_id: str) -> tuple[Record, Reading]:
    """A row as a checked record.

    Raises:
        BadRowError, SkippedRow: and nothing else, whatever the row holds.
    """
    try:
        reading = source.read(row)
    except (BadRowError, SkippedRow):
        raise
    except Exception as error:  # Of unknown origin: it must not end a build.
        raise BadRowError(f"cannot be read ({type(error).__name__}: {error})") from None
    problem = reading.problem.strip()
    domain = reading.domain or source.domain
    record = Record(record_id, domain, reading.task, problem, reading.grading)
    check(record)
    return record, reading


class _Agreement:
    """Grades in batches whether two published answers agree; started when first needed.

    The texts are of unknown origin, so they are graded where a model's are: in killable workers.
    """

    def __init__(self) -> None:
        self._pool: GraderPool | None = None
        self._waiting: list[tuple[Record, Reading]] = []

    def add(self, record: Record, reading: Reading) -> list[tuple[bool, Record]]:
        """Take a record; whatever is decided now, with its verdict, in order."""
        if reading.agreement is None:
            return [(True, record)]
        self._waiting.append((record, reading))
        return self.finish() if len(self._waiting) >= _BATCH else []

    def finish(self) -> list[tuple[bool, Record]]:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        if self._pool is None:
            self._pool = GraderPool(os.cpu_count() or 1, preload=["math"])
        items = [reading.agreement for _, reading in waiting if reading.agreement is not None]
        verdicts = self._pool.grade_many(items)
        return [
            (verdict.score == 1.0, record)
            for (record, _), verdict in zip(waiting, verdicts, strict=True)
        ]

    def __enter__(self) -> _Agreement:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()
