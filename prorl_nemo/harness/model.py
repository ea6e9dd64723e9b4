"""What is evaluated: a checkpoint of a run, a model's folder or hub name, or a server."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prorl_nemo.errors import UserError
from prorl_nemo.model_source import EXPORT_RECORD, resolve_model
from prorl_nemo.recipe import load_recipe

# What of a model's folder decides its answers.
_PARTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_NOT_PARTS = {EXPORT_RECORD}
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Model:
    """A model that can be asked.

    Attributes:
        name: as the result shows it, and as tables of reported numbers may know it.
        folder: of weights and tokenizer; None for a server.
        url: of a server.
        sha256: of the folder's files; None for a server, whose weights nobody can pin.
    """

    name: str
    folder: Path | None = None
    url: str | None = None
    sha256: str | None = None

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256}


def find_model(name: str, step: str | None = None) -> Model:
    """The model that an argument names.

    Args:
        name: a run's folder or recipe, a model's folder, a hub name, smollm2-135m-instruct,
            tiny-arithmetic, or the URL of an OpenAI-compatible server.
        step: for a run: `last` (the default), `best` (of its validations), or a step.

    Raises:
        UserError: nothing there, or damaged.
    """
    if name.startswith(("http://", "https://")):
        _no_step(step, "a server")
        return Model(name, url=name.rstrip("/"))
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        recipe = load_recipe(path)
        if not (recipe.run_dir / "recipe.yaml").is_file():
            raise UserError(
                f"{path}: its run has not begun; its first model is {recipe.model}, which can be "
                "evaluated by that name"
            )
        path = recipe.run_dir
    if (path / "recipe.yaml").is_file():
        return _of_run(path, step)
    _no_step(step, "a model")
    folder = resolve_model(name)
    shown = name if not path.exists() else folder.name
    return Model(shown, folder, sha256=folder_sha256(folder))


def folder_sha256(folder: Path) -> str:
    """Of the names and contents of the files that decide a model's answers."""
    whole = hashlib.sha256()
    files = {path for pattern in _PARTS for path in folder.glob(pattern)}
    for path in sorted(files):
        if path.name in _NOT_PARTS:
            continue
        one = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                one.update(block)
        whole.update(f"{path.name} {one.hexdigest()}\n".encode())
    return whole.hexdigest()


def _of_run(run_dir: Path, step: str | None) -> Model:
    """A checkpoint, exported into the run's own `exports/` unless it is there already."""
    # Imports torch, which neither a server nor grading again needs.
    from prorl_nemo.export import chosen_step, export_in_run

    recipe = load_recipe(run_dir / "recipe.yaml")
    chosen = chosen_step(run_dir, step)
    folder = export_in_run(run_dir, chosen)
    return Model(f"{recipe.name}, step {chosen}", folder, sha256=folder_sha256(folder))


def _no_step(step: str | None, what: str) -> None:
    if step is not None:
        raise UserError(f"--step: {what} has no steps; only a run has")
