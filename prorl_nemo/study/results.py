"""The results there are, and whether they belong together: one first model, one recipe each.

Results are made over weeks, on several machines, and a figure does not show that two of its curves
began with other weights or other settings. So nothing is drawn or run before all of them agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prorl_nemo.errors import RecipeError, UserError
from prorl_nemo.harness.model import folder_sha256
from prorl_nemo.recipe import Recipe, parse_recipe
from prorl_nemo.settings_file import changed_keys
from prorl_nemo.study.compact import read_result
from prorl_nemo.study.plan import Study
from prorl_nemo.training.run_dir import RESUMABLE

Runs = dict[int, dict[str, Any]]
"""Seed -> result."""

_KEYS = {
    *("model_sha256", "recipe", "versions", "processor", "steps", "training_seconds", "starts"),
    *("tasks", "validation", "train", "events", "probe", "rows_lost"),
}
# Of the model its sum counts, wherever it lies.
_NO_MATTER = {*RESUMABLE, "model"}


def read_results(study: Study, model_sha256: str | None) -> dict[str, Runs]:
    """Results of each variant that has any, in the study's order.

    Args:
        model_sha256: of the first model; None where it is not there: then they must agree among
            themselves.

    Raises:
        UserError: a result that is damaged, or of another first model, recipe or probe.
    """
    found: dict[str, Runs] = {}
    for variant in study.variants:
        for seed in variant.seeds:
            file = study.result_file(variant.name, seed)
            result = read_result(file)
            if result is None:
                continue
            if lacks := _KEYS - result.keys():
                raise UserError(
                    f"{file}: lacks {', '.join(sorted(lacks))}; restore it, or delete it to run it "
                    "again"
                )
            model_sha256 = model_sha256 or result["model_sha256"]
            if result["model_sha256"] != model_sha256:
                raise UserError(
                    f"{file}: its run began with another first model (sha256 "
                    f"{result['model_sha256'][:12]}) than {study.model} and the other results "
                    f"({model_sha256[:12]}); restore that model, or delete this result to run it "
                    "again"
                )
            _same_recipe(file, result, study.recipe_of(variant, seed))
            _same_probe(file, result, study)
            found.setdefault(variant.name, {})[seed] = result
    return found


def sha256_of(study: Study) -> str | None:
    """Of the first model, or None where it is not there."""
    folder = Path(study.model)
    return folder_sha256(folder) if folder.exists() else None


def refuse(file: Path, what: str, changes: Iterable[tuple[str, Any, Any]], fix: str) -> None:
    """Raise UserError if there are `changes`: (key, there, now)."""
    lines = [f"{key}: {there!r} there, {now!r} now" for key, there, now in changes]
    if lines:
        more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise UserError(f"{file}: {what}; {fix}\n  " + "\n  ".join(lines[:10] + more))


def _same_recipe(file: Path, result: dict[str, Any], recipe: Recipe) -> None:
    try:
        # Read as a recipe, so that keys added since have their defaults.
        there = parse_recipe(result["recipe"]).model_dump(mode="json")
    except RecipeError as error:
        raise UserError(
            f"{file}: its recipe is of another version; delete it to run it again\n  {error}"
        ) from None
    changes = changed_keys(there, recipe.model_dump(mode="json"))
    refuse(
        file,
        "its run had another recipe",
        [(key, *pair) for key, pair in changes.items() if key not in _NO_MATTER],
        "restore those settings, or delete the result to run it again",
    )


def _same_probe(file: Path, result: dict[str, Any], study: Study) -> None:
    there = result["probe"]
    if there is None:
        return
    now = {"prompts_per_task": study.probe.prompts_per_task, "samples": study.probe.samples}
    refuse(
        file,
        "its model was asked otherwise",
        [(f"probe.{key}", there[key], value) for key, value in now.items() if there[key] != value],
        "restore those settings, or delete the result to run it again",
    )
