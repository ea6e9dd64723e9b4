"""Figures and tables of a study from its results: `README.md` with SVGs, and `study.html`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prorl_nemo.study.ablations import ablation_blocks
from prorl_nemo.study.blocks import Block, Heading, Text, render_html, write_markdown
from prorl_nemo.study.main_run import main_blocks
from prorl_nemo.study.plan import MAIN, Study
from prorl_nemo.study.results import read_results, sha256_of

PAGE = "study.html"
_TITLE = "What prolonged RL does"
_SAYS = (
    "± is a 95 % interval over seeds (Student's t): what another run would give on the same "
    "held-out prompts. A verdict needs an interval without zero. Seeds that agree to the digit "
    "have ± 0.000 and decide nothing: figures are counted in prompts and samples, so some meet."
)


def write_pages(study: Study) -> bool:
    """Pages of the results there are, in their folder; whether there are any.

    Raises:
        UserError: results that do not belong together (`results`).
    """
    found = read_results(study, sha256_of(study))
    if not found:
        return False
    folder = Path(study.results)
    blocks: list[Block] = [Text(_SAYS)]
    if MAIN in found:
        blocks += main_blocks(found[MAIN])
    blocks += ablation_blocks(study, found)
    results = [result for runs in found.values() for result in runs.values()]
    count = f"{len(results)} run{'s' if len(results) > 1 else ''}"
    hours = sum(result["training_seconds"] for result in results) / 3600
    about = (
        f"{count}, {hours:.1f} hours, from the model {results[0]['model_sha256'][:12]}; "
        + _versions(results)
    )
    head: list[Block] = [Heading(_TITLE, 1), Text(f"Made by `prorl study`: {about}.")]
    write_markdown(folder, "README.md", [*head, *blocks])
    page = render_html("ProRL study", _TITLE, about, blocks)
    (folder / PAGE).write_text(page, encoding="utf-8")
    return True


def _versions(results: Sequence[dict[str, Any]]) -> str:
    """Packages with every version that a run had: results are made over weeks."""
    had: dict[str, list[str]] = {}
    for result in results:
        for name, version in result["versions"].items():
            of_name = had.setdefault(name, [])
            if version not in of_name:
                of_name.append(version)
    return ", ".join(f"{name} {' and '.join(versions)}" for name, versions in had.items())
