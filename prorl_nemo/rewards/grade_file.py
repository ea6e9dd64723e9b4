"""Grade a file of responses and tell what the graders said: `prorl grade FILE.jsonl`.

One JSON object a line: `grading` (the record) and `response`, optionally `domain` and `id`.
A line that cannot be graded is reported with its number and counted, never skipped in
silence.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from prorl_nemo.errors import UserError
from prorl_nemo.rewards.pool import GraderPool
from prorl_nemo.rewards.verdict import GradingError, Verdict

_AHEAD = 64  # responses in flight for each worker: enough to keep it busy, little memory


@dataclass
class Tally:
    """How many responses of a domain got a verdict of one kind, and their scores' sum."""

    count: int = 0
    score: float = 0.0


@dataclass
class Report:
    """What became of a file.

    Attributes:
        tallies: by (domain, reason up to its first colon).
        bad_lines: line number (from 1) and what is wrong with it.
    """

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    bad_lines: list[tuple[int, str]] = field(default_factory=list)

    def add(self, domain: str, verdict: Verdict) -> None:
        """Count a verdict under its domain and reason."""
        tally = self.tallies.setdefault((domain, verdict.reason.split(":")[0]), Tally())
        tally.count += 1
        tally.score += verdict.score

    @property
    def graded(self) -> int:
        """Responses with a verdict."""
        return sum(tally.count for tally in self.tallies.values())

    def table(self) -> Table:
        """Domains and reasons with counts, shares of the domain and mean scores."""
        table = Table("domain", "reason")
        for column in ("responses", "share", "mean score"):
            table.add_column(column, justify="right")
        domains = sorted({domain for domain, _ in self.tallies})
        for domain in domains:
            rows = [(r, t) for (d, r), t in self.tallies.items() if d == domain]
            total = Tally(sum(t.count for _, t in rows), sum(t.score for _, t in rows))
            rows.sort(key=lambda row: -row[1].count)
            for reason, tally in [*rows, ("all", total)]:
                share = f"{tally.count / total.count:.1%}"
                mean = f"{tally.score / tally.count:.4f}"
                table.add_row(domain, reason, str(tally.count), share, mean)
            table.add_section()
        return table


def grade_file(
    path: str | Path,
    *,
    workers: int | None = None,
    training: bool = True,
    out: str | Path | None = None,
    sandbox: str = "auto",
) -> Report:
    """Grade every line of a file.

    Args:
        path: the responses.
        workers: graders at a time; default: the cores of the machine.
        training: continuous scores as in training; False: the protocol of evaluation.
        out: where to write one JSON object a line with id, line, score, parts and reason.
        sandbox: where code runs (see GraderPool).

    Raises:
        UserError: the file cannot be read, it is `out`, or no line of it can be graded.
    """
    report = Report()
    sink: TextIO | None = None
    try:
        if out and os.path.exists(out) and os.path.samefile(path, out):
            raise UserError(f"--out: {out} is the file to be graded; write to another one")
        sink = open(out, "w", encoding="utf-8") if out else None  # noqa: SIM115
        with GraderPool(workers or os.cpu_count() or 1, sandbox=sandbox) as pool:
            for number, row, verdict in _verdicts(Path(path), pool, training, report):
                report.add(str(row.get("domain") or row["grading"]["kind"]), verdict)
                if sink:
                    known = {"id": row.get("id", number), "line": number}
                    said = {"score": verdict.score, "reason": verdict.reason}
                    line = {**known, **said, "parts": verdict.parts}
                    sink.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from None
    finally:
        if sink:
            sink.close()
    if not report.graded:
        why = f"line {report.bad_lines[0][0]}: {report.bad_lines[0][1]}" if report.bad_lines else ""
        raise UserError(f"{path}: no line can be graded; {why or 'the file is empty'}")
    return report


def _verdicts(
    path: Path, pool: GraderPool, training: bool, report: Report
) -> Iterator[tuple[int, dict[str, Any], Verdict]]:
    """(line number, row, verdict), in the file's order, with a bounded number in flight."""
    waiting: deque[tuple[int, dict[str, Any], Future[Verdict]]] = deque()

    def finish() -> Iterator[tuple[int, dict[str, Any], Verdict]]:
        number, row, future = waiting.popleft()
        try:
            yield number, row, future.result()
        except GradingError as error:
            report.bad_lines.append((number, str(error)))

    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _row(line)
            if isinstance(row, str):
                report.bad_lines.append((number, row))
                continue
            future = pool.submit(str(number), row["grading"], row["response"], training=training)
            waiting.append((number, row, future))
            if len(waiting) >= _AHEAD * (os.cpu_count() or 1):
                yield from finish()
    while waiting:
        yield from finish()


def _row(line: str) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(row, dict):
        return "not an object"
    if not isinstance(row.get("grading"), dict):
        return "`grading` must be the record of the prompt"
    if not isinstance(row.get("response"), str):
        return "`response` must be a text"
    return row
