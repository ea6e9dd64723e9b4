"""Published scores, read from `eval/reported/*.csv`, and our results set beside them.

Scores of one model under two protocols differ by more than most papers gain, so each number keeps
its protocol, its metric and what is doubtful about it. A difference is held against the noise of
sampling: both evaluations ran on the same items, so the choice of items is no part of it.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.estimators import Average
from prorl_nemo.strict_yaml import YAMLError, load_yaml

COLUMNS = ("model", "benchmark", "value", "metric", "protocol", "source", "doubt")
# avg: strict scores; reward: continuous ones; average: over benchmarks.
_METRIC = re.compile(r"(avg|reward|pass|cons)@(\d+)|average|mean_tokens")
_VALUE = re.compile(r"[0-9]+(\.[0-9]+)?")
_MOST_TOKENS = 1e6
# Two-sided 95 %.
_Z = 1.96


@dataclass(frozen=True)
class Reported:
    """A published number.

    Attributes:
        value: percent; tokens for the metric `mean_tokens`.
        metric: avg@n (strict 0 or 1), reward@n (continuous), pass@k, cons@k, average, mean_tokens.
        protocol: name of a file under `eval/protocols`, or what the source did.
        doubt: what is known against it; may be empty.
        rounding: half a unit of its last printed digit.
        where: file and line.
    """

    model: str
    benchmark: str
    value: float
    metric: str
    protocol: str
    source: str
    doubt: str
    rounding: float
    where: str


@dataclass(frozen=True)
class Comparison:
    """Our result beside a published one, in points (percent).

    Attributes:
        difference: ours less theirs.
        noise: half width of the 95 % interval of the difference between two evaluations of one
            model; None where it cannot be told, or where the metrics are not the same.
        inside_noise: whether the difference is within it, rounding of the printed number allowed.
        mismatches: why the two are not the same measurement; empty when they are.
    """

    reported: Reported
    difference: float
    noise: float | None
    inside_noise: bool | None
    mismatches: tuple[str, ...]


def load_reported(folder: Path, benchmarks: Collection[str]) -> list[Reported]:
    """Every number of a folder's tables, in the order of files and lines.

    Args:
        folder: holds `*.csv` and `not_run.yaml`, which explains names that only others report.
        benchmarks: the names we have definitions of.

    Raises:
        UserError: a malformed line, an unknown benchmark or metric, a value out of range, or the
            same number twice; the message names file and line.
    """
    known = set(benchmarks) | set(_not_run(folder / "not_run.yaml", benchmarks))
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise UserError(f"{folder}: holds no tables of reported numbers (*.csv)")
    found: list[Reported] = []
    seen: dict[tuple[str, ...], str] = {}
    for path in files:
        for reported in _read(path, known):
            key = (reported.model, reported.benchmark, reported.metric, reported.protocol,
                   reported.source)  # fmt: skip
            if key in seen:
                raise UserError(f"{reported.where}: repeats {seen[key]}; keep one of the two")
            seen[key] = reported.where
            found.append(reported)
    return found


def compare(
    ours: Average, reported: Reported, *, protocol: str, metric: str, whole: bool = True
) -> Comparison:
    """Set a result beside a published number of the same benchmark.

    The noise is that of two evaluations of one model: our error over samples, and theirs, which is
    ours scaled to their n. Items that were left out add their own noise, so a subset is held
    against the error over items. So is a single sample per item, as the error over items bounds it.
    Scores that are all alike show no error, which is not to have none: then the noise is at least
    3 / n, the 95 % bound on what n draws without an event leave open (rule of three).

    Args:
        ours: scores in [0, 1].
        protocol, metric: ours, as the columns have them; `avg` or `reward` without its n.
        whole: all items of the benchmark were evaluated.
    """
    mismatches = []
    named = _METRIC.fullmatch(reported.metric)
    kind, count = (named[1], named[2]) if named else (None, None)
    # A printed pass@1 is an avg@n whose n is not told.
    same_metric = kind == metric or (kind == "pass" and count == "1" and metric == "avg")
    if not same_metric:
        mismatches.append(f"metric {reported.metric}, ours {metric}@{ours.samples}")
    if reported.protocol != protocol:
        mismatches.append(f"protocol {reported.protocol}, ours {protocol}")
    if not whole:
        mismatches.append(f"{ours.items} items only")
    difference = 100 * ours.mean - reported.value
    repeated = ours.error_items if ours.error_samples is None else ours.error_samples
    our_error = repeated if whole else ours.error_items
    if not same_metric or repeated is None or our_error is None:
        return Comparison(reported, difference, None, None, tuple(mismatches))
    theirs = int(count) if count and kind == metric else ours.samples
    noise = 100 * _Z * math.hypot(our_error, repeated * math.sqrt(ours.samples / theirs))
    if our_error == 0:
        draws = ours.items * (ours.samples if whole else 1)
        noise = max(noise, 100 * 3 / draws)
    inside = abs(difference) <= noise + reported.rounding
    return Comparison(reported, difference, noise, inside, tuple(mismatches))


def _read(path: Path, known: Collection[str]) -> list[Reported]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = [(reader.line_num, row) for reader in [csv.reader(file, strict=True)]
                     for row in reader]  # fmt: skip
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({error})") from None
    if not lines or tuple(lines[0][1]) != COLUMNS:
        raise UserError(f"{path}: the first line must be {','.join(COLUMNS)}")
    return [_row(row, f"{path}:{number}", known) for number, row in lines[1:]]


def _row(row: list[str], where: str, known: Collection[str]) -> Reported:
    if len(row) != len(COLUMNS):
        raise UserError(f"{where}: {len(row)} columns, {len(COLUMNS)} are needed")
    cells = dict(zip(COLUMNS, row, strict=True))
    empty = [name for name, cell in cells.items() if not cell.strip() and name != "doubt"]
    if empty or any(cell != cell.strip() for cell in row):
        raise UserError(f"{where}: {empty[0] if empty else 'a cell'} is empty or padded")
    if cells["benchmark"] not in known:
        raise UserError(
            f"{where}: unknown benchmark {cells['benchmark']!r}; define it under eval/benchmarks "
            "or explain it in not_run.yaml"
        )
    metric = cells["metric"]
    named = _METRIC.fullmatch(metric)
    if not named or named[2] == "0":
        raise UserError(f"{where}: unknown metric {metric!r}")
    value = float(cells["value"]) if _VALUE.fullmatch(cells["value"]) else math.inf
    if value > (_MOST_TOKENS if metric == "mean_tokens" else 100):
        raise UserError(f"{where}: value {cells['value']!r} is no percentage, like 49.58")
    names = {name: cells[name] for name in COLUMNS if name != "value"}
    decimals = len(cells["value"].partition(".")[2])
    return Reported(value=value, rounding=0.5 * 10.0**-decimals, where=where, **names)


def _not_run(path: Path, benchmarks: Collection[str]) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        names = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(names, dict) or not all(isinstance(text, str) for text in names.values()):
        raise UserError(f"{path}: must map names of benchmarks to what they are")
    for name in names:
        if name in benchmarks:
            raise UserError(f"{path}: {name} has a definition; remove it here")
    return names
