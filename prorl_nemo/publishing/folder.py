"""What lies beside the weights of a model that others are to judge: log, recipe, evaluations.

    training/recipe.yaml, metrics.jsonl, events.jsonl   of the steps up to the exported one
    curves.svg                                          its validation
    evaluation/NAME.json, NAME.md                       results of `prorl eval`
    README.md                                           the model card, made of all this

Our choice: the card is made from the files beside it and from nothing else, so that whoever has
the folder can check every line of it. Paths and machine names stay at home.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from prorl_nemo.errors import UserError
from prorl_nemo.harness.model import folder_sha256
from prorl_nemo.model_source import EXPORT_RECORD
from prorl_nemo.publishing.card import model_card
from prorl_nemo.recipe import load_recipe
from prorl_nemo.reporting.figure import validation_points, write_figure
from prorl_nemo.reporting.run import Run, read_run
from prorl_nemo.strict_yaml import dump_yaml

CURVES = "curves.svg"
# What happened to the policy; the others tell of machines, and hold paths.
_EVENTS = {
    "run_started", "stage_started", "stage_ended", "cosine_penalty", "reference_reset", "resumed",
    "collapse_warning", "mismatch_warning", "stopped", "finished",
}  # fmt: skip
_PRIVATE = ("checkpoint", "path", "files", "reason")


def add_training(folder: Path, run_dir: Path) -> None:
    """Put the recipe and the log of a run beside the weights that were exported from it.

    Raises:
        UserError: the folder is no export, or a file cannot be read or written.
    """
    step = about(folder)["step"]
    target = folder / "training"
    try:
        target.mkdir(exist_ok=True)
        recipe = load_recipe(run_dir / "recipe.yaml").model_dump(mode="json")
        (target / "recipe.yaml").write_text(dump_yaml(_without_paths(recipe)), encoding="utf-8")
        for name in ("metrics.jsonl", "events.jsonl"):
            source = run_dir / name
            lines = _rows_until(source, step, name == "events.jsonl") if source.exists() else []
            (target / name).write_text("".join(lines), encoding="utf-8")
        (folder / CURVES).unlink(missing_ok=True)
        run = _log(folder)
        if run is not None and validation_points(run):
            write_figure([target], folder / CURVES, "Held-out score, ± 2 standard errors")
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error})") from None


def add_evaluations(folder: Path, evaluations: Sequence[Path]) -> None:
    """Put results of `prorl eval` beside the weights that they are about.

    Raises:
        UserError: no results there, or results of other weights.
    """
    if not evaluations:
        return
    sha256 = folder_sha256(folder)
    target = folder / "evaluation"
    target.mkdir(exist_ok=True)
    for evaluation in evaluations:
        try:
            document = json.loads((evaluation / "results.json").read_text(encoding="utf-8"))
            manifest = document["manifest"]
            measured, label = manifest["model"]["sha256"], manifest["protocol"]["label"]
            page = (evaluation / "results.md").read_text(encoding="utf-8")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--evaluation: {evaluation} holds no results of `prorl eval` ({error})"
            ) from None
        if measured != sha256:
            raise UserError(
                f"--evaluation: {evaluation} measured other weights than those of {folder}"
            )
        name = _free_name(target, re.sub(r"[^A-Za-z0-9._]+", "-", label).strip("-."), manifest)
        (target / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
        (target / f"{name}.md").write_text(page, encoding="utf-8")


def _free_name(folder: Path, name: str, manifest: dict[str, Any]) -> str:
    """The name, numbered where another evaluation has it: one protocol may have been asked about
    mathematics and about code."""
    for number in count(1):
        numbered = name if number == 1 else f"{name}-{number}"
        file = folder / f"{numbered}.json"
        if not file.exists() or json.loads(file.read_text())["manifest"] == manifest:
            break
    return numbered


def write_card(folder: Path, licence: str | None = None) -> str:
    """Write README.md from what lies in the folder. Returns its text.

    Raises:
        UserError: the folder is no export.
    """
    results = []
    for file in sorted((folder / "evaluation").glob("*.json")):
        results.append(json.loads(file.read_text(encoding="utf-8")))
    text = model_card(about(folder), _log(folder), results, (folder / CURVES).exists(), licence)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text


def about(folder: Path) -> dict[str, Any]:
    """What an exported folder says of itself. Raises UserError if it is none."""
    try:
        found = json.loads((folder / EXPORT_RECORD).read_text(encoding="utf-8"))
        if isinstance(found["step"], int) and isinstance(found["run"], str):
            return dict(found)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{folder}: no export of a run (it has no {EXPORT_RECORD}); make one with prorl export"
    )


def _log(folder: Path) -> Run | None:
    """The training's log that lies in a folder; None where it is not there or has no row."""
    metrics = folder / "training" / "metrics.jsonl"
    if not metrics.exists() or not metrics.stat().st_size:
        return None
    return read_run(metrics.parent, with_samples=False)


def _rows_until(path: Path, step: int, events: bool) -> list[str]:
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # The last line of a run that goes on may be half written.
        if not isinstance(row, dict) or row.get("step", 0) > step:
            continue
        if events:
            if row.get("event") not in _EVENTS:
                continue
            row = {key: value for key, value in row.items() if key not in _PRIVATE}
        lines.append(json.dumps(row) + "\n")
    return lines


def _without_paths(value: Any) -> Any:
    """A resolved recipe with the last part of each absolute path in the place of the path."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name or value
    return value
