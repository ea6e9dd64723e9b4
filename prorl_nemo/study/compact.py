"""A finished run in some tens of kilobytes: what figures and tables are made from, and committed.

Validations are kept whole. Of the steps, means over stretches of ten: single steps of a small batch
are noise, and a reader of the curve sees no more.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prorl_nemo.errors import UserError
from prorl_nemo.training.metrics import EVENTS, METRICS, Row, read_rows

FORMAT = 1
STRETCH = 10
DIGITS = 5  # significant
CURVES = (
    "reward/raw_mean",
    "rollout/kept_share",
    "rollout/response_tokens_mean",
    "rollout/truncated_share",
    "rollout/generated_tokens",
    "policy/entropy",
    "policy/kl",
    "policy/grad_norm",
    "policy/clip_share_high",
    "policy/clip_share_low",
    "shaping/cosine_on",
    "mismatch/kl",
    "time/step",
    "time/generate",
    "time/train",
)
_EVENTS = ("reference_reset", "stage_started", "cosine_penalty", "resumed", "restarted")

Counts = dict[str, int]
"""Prompt id -> how many of its samples were right."""


def compact(run_dir: Path, probes: Mapping[str, Counts], samples: int) -> dict[str, Any]:
    """Everything of a finished run that the study needs; JSON-able.

    Args:
        probes: `start` and `end`, see `probe`.
        samples: of each prompt in them.

    Raises:
        UserError: the run has no figures.
    """
    rows = read_rows(run_dir / METRICS)
    train = [row for row in rows if row["kind"] == "train"]
    if not train:
        raise UserError(f"{run_dir}: has no steps, so there is no result to keep")
    return {
        "format": FORMAT,
        "run": run_dir.name,
        "steps": train[-1]["step"],
        "training_seconds": _digits(sum(row.get("time/step") or 0.0 for row in train)),
        "validation": [_validation(row) for row in rows if row["kind"] == "validation"],
        "train": stretches(train),
        "events": [
            {key: value for key, value in row.items() if key not in ("time", "path")}
            for row in read_rows(run_dir / EVENTS)
            if row["event"] in _EVENTS
        ],
        "probe_samples": samples,
        "probes": {when: dict(counts) for when, counts in probes.items()},
    }


def stretches(train: Sequence[Row]) -> dict[str, list[Any]]:
    """Means over stretches of steps; `step` is the last of each. A curve that no step has is left
    out, and a stretch without a value is None."""
    groups: dict[int, list[Row]] = {}
    for row in train:
        groups.setdefault((row["step"] - 1) // STRETCH, []).append(row)
    found: dict[str, list[Any]] = {"step": [group[-1]["step"] for group in groups.values()]}
    for curve in CURVES:
        values = [
            [row[curve] for row in group if row.get(curve) is not None] for group in groups.values()
        ]
        if any(values):
            found[curve] = [_digits(statistics.fmean(v)) if v else None for v in values]
    return found


def write_result(file: Path, result: Mapping[str, Any]) -> None:
    """Written aside and renamed: a result is whole or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    aside.replace(file)


def read_result(file: Path) -> dict[str, Any] | None:
    """A result, or None if it is not there.

    Raises:
        UserError: it is damaged, or of another version.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); restore or delete it") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{file}: not a result of this version; delete it to run it again")
    return found


def _validation(row: Row) -> dict[str, Any]:
    kept = {key.removeprefix("validation/"): value for key, value in row.items() if "/" in key}
    return {"step": row["step"]} | {
        key: _digits(value) if isinstance(value, float) else value for key, value in kept.items()
    }


def _digits(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
