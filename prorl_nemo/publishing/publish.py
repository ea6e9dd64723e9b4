"""`prorl publish`: what would be sent, shown or sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prorl_nemo.errors import UserError
from prorl_nemo.publishing.card import known_licence
from prorl_nemo.publishing.folder import about, add_evaluations, add_training, write_card
from prorl_nemo.publishing.upload import File, check_names, files_of, publish, tag_of


@dataclass(frozen=True)
class Ready:
    """A folder that is whole and can be sent."""

    folder: Path
    repository: str
    tag: str
    files: list[File]
    card: str


def prepare(
    folder: Path,
    repository: str,
    step: str | None = None,
    tag: str | None = None,
    evaluations: Sequence[Path] = (),
    licence: str | None = None,
) -> Ready:
    """The folder with card and log, checked; a run is exported first.

    Raises:
        UserError: a name the hub refuses, no export and no run, or no licence.
    """
    check_names(repository, tag or "step")
    if (folder / "recipe.yaml").is_file():
        # Imports torch, which an exported folder does not need.
        from prorl_nemo.export import chosen_step, export_in_run

        run, folder = folder, export_in_run(folder, chosen_step(folder, step))
        add_training(folder, run)
    elif step is not None:
        raise UserError("--step: an exported folder is of one step; only a run has several")
    said = about(folder)
    # Nobody may use what has no licence, and we must not invent one.
    if licence is None and known_licence(said) is None:
        raise UserError(
            f"--license: that of {said.get('model')} is not known here; give the one under which "
            "you may publish (mit, apache-2.0, cc-by-nc-4.0, other ...)"
        )
    add_evaluations(folder, evaluations)
    card = write_card(folder, licence)
    return Ready(folder, repository, tag or tag_of(folder), files_of(folder), card)


def send(ready: Ready, private: bool) -> str:
    """Upload; see `upload.publish`."""
    return publish(ready.folder, ready.repository, ready.tag, private)


def show(ready: Ready, private: bool, console: Console) -> None:
    """Every file with size and sum, and the card as it would be."""
    table = Table("file", "sha256", title=f"{ready.folder} to {ready.repository}, {ready.tag}")
    table.add_column("bytes", justify="right")
    for file in ready.files:
        table.add_row(escape(file.path), file.sha256[:16], f"{file.size:,}")
    console.print(table)
    total = sum(file.size for file in ready.files)
    seen = "private" if private else "public"
    console.print(f"{len(ready.files)} files, {total:,} bytes, {seen}; nothing was sent")
    console.rule("README.md")
    console.print(ready.card, markup=False, highlight=False, soft_wrap=True)
