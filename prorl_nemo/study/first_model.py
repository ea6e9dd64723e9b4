"""The model that all runs of a study begin with: committed, or made by pretraining once."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from prorl_nemo.errors import RecipeError, UserError
from prorl_nemo.harness.model import folder_sha256
from prorl_nemo.model_source import EXPORT_RECORD, check_model_folder
from prorl_nemo.pretraining.run import pretrain
from prorl_nemo.recipe_pretrain import Pretraining, load_pretraining
from prorl_nemo.settings_file import changed_keys, parse_settings
from prorl_nemo.study.compact import read_result
from prorl_nemo.study.plan import Study
from prorl_nemo.study.results import refuse
from prorl_nemo.training.metrics import METRICS, replace_file
from prorl_nemo.training.run_dir import RESUMABLE

# Where and how it was made, and how often it was examined: the model is the same.
_NO_MATTER = ("name", "exam", "checkpoint", "faults", *RESUMABLE)
_MARK = "first_model.json"


@dataclass(frozen=True)
class FirstModel:
    """A model's folder, and the sum of the files that decide its answers."""

    folder: Path
    sha256: str


def first_model(study: Study, console: Console) -> FirstModel | None:
    """The study's first model, made if need be; None if that was stopped.

    Raises:
        UserError: it was made by another recipe, or is gone while results began with it.
    """
    settings = load_pretraining(study.pretraining, [])
    folder = Path(study.model)
    if not folder.exists():
        _refuse_another(study)
        made = pretrain(settings, console)
        if made is None:
            return None
        _copy(made, folder)
        said = f"first model: {folder}; commit it with the results"
        console.print(said, markup=False, soft_wrap=True)
    check_model_folder(folder)
    _same_recipe(study, settings)
    return FirstModel(folder, folder_sha256(folder))


def hold(run_dir: Path, model: FirstModel) -> None:
    """Note in a run's folder which model it begins with.

    Raises:
        UserError: it began with another one, or nobody knows which.
    """
    file = run_dir / _MARK
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))["sha256"]
        if there != model.sha256:
            raise UserError(
                f"{run_dir}: began with another first model (sha256 {there[:12]}) than "
                f"{model.folder} ({model.sha256[:12]}); restore that one, or delete the folder"
            )
        return
    metrics = run_dir / METRICS
    if metrics.exists() and metrics.stat().st_size:
        raise UserError(
            f"{run_dir}: was not begun by a study, so nobody knows its first model; delete or "
            "rename that folder"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_file(file, [json.dumps({"sha256": model.sha256}).encode() + b"\n"])


def _refuse_another(study: Study) -> None:
    for variant in study.variants:
        for seed in variant.seeds:
            file = study.result_file(variant.name, seed)
            if read_result(file) is not None:
                raise UserError(
                    f"model: {study.model} is not there, and {file} began with it; restore the "
                    "folder (it is committed with the results), or delete the results"
                )


def _copy(made: Path, folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(made, aside)
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"model: {folder} cannot be written ({error})") from None


def _same_recipe(study: Study, settings: Pretraining) -> None:
    file = Path(study.model) / EXPORT_RECORD
    fix = (
        f"restore {study.pretraining}, or delete {study.model} and the results to begin with "
        "another model"
    )
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        there = parse_settings(Pretraining, about["recipe"], str(file))
    except (OSError, ValueError, KeyError, TypeError, RecipeError) as error:
        raise UserError(f"{file}: does not say how the model was made ({error}); {fix}") from None
    changes = changed_keys(there.model_dump(mode="json"), settings.model_dump(mode="json"))
    refuse(
        file,
        f"the model was made by another recipe than {study.pretraining}",
        [
            (key, *pair)
            for key, pair in changes.items()
            if key not in _NO_MATTER and key.split(".")[0] not in _NO_MATTER
        ],
        fix,
    )
