"""Figures and tables of a study, from its results: Markdown, and SVG that follows the theme."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prorl_nemo.evaluation.result import category_of
from prorl_nemo.reporting.figure import draw
from prorl_nemo.study.analysis import (
    Estimate,
    around,
    by_task,
    crossing,
    curve,
    difference,
    estimate,
    sure_count,
)
from prorl_nemo.study.compact import read_result
from prorl_nemo.study.forest import draw_forest
from prorl_nemo.study.plan import MAIN, Study

SCORE, PASS = "mean", "pass"
NEVER = "never_trained/"

Runs = dict[int, dict[str, Any]]
"""Seed -> result."""


def write_pages(study: Study) -> None:
    """`README.md` and figures in the folder of results, of those there are; nothing without any."""
    found = {
        variant.name: runs
        for variant in study.variants
        if (
            runs := {
                seed: result
                for seed in variant.seeds
                if (result := read_result(study.result_file(variant.name, seed))) is not None
            }
        )
    }
    if not found:
        return
    folder = Path(study.results)
    pages = ["# Results\n\nMade by `prorl study`; ± is a 95 % interval over seeds (Student's t).\n"]
    if MAIN in found:
        pages += _main(study, folder, found[MAIN])
    pages += _variants(study, folder, found)
    (folder / "README.md").write_text("\n".join(pages), encoding="utf-8")


def _main(study: Study, folder: Path, runs: Runs) -> list[str]:
    results = list(runs.values())
    last = min(result["steps"] for result in results)
    names = {
        SCORE: "trained, mean",
        PASS: "trained, pass@n",
        f"{NEVER}{SCORE}": "unseen, mean",
        f"{NEVER}{PASS}": "unseen, pass@n",
    }
    curves = [(name, points) for key, name in names.items() if (points := curve(results, key))]
    title = f"Main run, {len(runs)} seeds, ± 2 standard errors over seeds"
    (folder / "main.svg").write_text(draw(curves, title), encoding="utf-8")
    lines = [
        "## The main run\n",
        f"{len(runs)} seeds, {last:,} steps; each value the mean of the last validations up to the "
        "step.\n",
        "![Validation over training](main.svg)\n",
        _table(
            ["", *(f"step {step:,}" for step in _marks(last)), "last third"],
            [
                [name, *(str(_at(runs, step, key)) for step in _marks(last)), str(_late(runs, key))]
                for key, name in names.items()
                if curve(results, key)
            ],
        ),
        "*Unseen*: tasks that are never trained on. *Last third*: gain over the last third of the "
        "steps, paired by seed.\n",
        "### By category and task\n",
        _table(
            ["", "mean, start", "mean, end", "pass@n, start", "pass@n, end"],
            [
                [name, *(str(_of(runs, s, p, tasks)) for p in ("", "pass/") for s in (0, last))]
                for name, tasks in _categories(results[0])
            ],
        ),
    ]
    return [*lines, *_crossings(study, runs)]


def _crossings(study: Study, runs: Runs) -> list[str]:
    samples = study.probe.samples
    rows = []
    tasks = sorted(by_task(next(iter(runs.values()))["probes"]["start"]))
    for task in [None, *tasks]:
        found = []
        for result in runs.values():
            start, end = result["probes"]["start"], result["probes"]["end"]
            if task:
                start, end = by_task(start).get(task, {}), by_task(end).get(task, {})
            found.append(crossing(start, end, samples))
        fields = ("prompts", "solved", "solved_surely", "lost", "lost_surely", "never")
        rows.append(
            [task or "**all**"]
            + [f"{statistics.fmean(getattr(c, field) for c in found):.1f}" for field in fields]
        )
    return [
        f"### What {samples} samples solve, before and after\n",
        f"Prompts, mean over seeds. *Beyond chance*: {sure_count(samples)} or more of {samples} "
        "against none.\n",
        _table(
            ["task", "prompts", "newly solved", "beyond chance", "lost", "beyond chance", "never"],
            rows,
        ),
    ]


def _variants(study: Study, folder: Path, found: Mapping[str, Runs]) -> list[str]:
    step = study.compare_at
    curves, rows, differences = [], [], []
    main = found.get(MAIN, {})
    for variant in study.variants:
        runs = {s: r for s, r in found.get(variant.name, {}).items() if r["steps"] >= step}
        if not runs:
            continue
        upto = [
            {**r, "validation": [v for v in r["validation"] if v["step"] <= step]}
            for r in runs.values()
        ]
        curves.append((variant.name, curve(upto, SCORE)))
        row = [variant.name, variant.question, str(len(runs))]
        for key in (SCORE, PASS, f"{NEVER}{SCORE}"):
            here = {s: around(r, step, key) for s, r in runs.items() if _has(r, key)}
            there = {s: around(r, step, key) for s, r in main.items() if _has(r, key)}
            apart = difference(here, there) if variant.name != MAIN else None
            if apart and key == SCORE:
                differences.append((variant.name, apart))
            row += [str(estimate(list(here.values()))) if here else "", str(apart) if apart else ""]
        rows.append(row)
    if not rows:
        return []
    less = "less main"
    title = f"Variants up to step {step:,}: mean score on trained tasks, ± 2 standard errors"
    (folder / "variants.svg").write_text(draw(curves, title), encoding="utf-8")
    figure = []
    if differences:
        title = f"Mean score at step {step:,} less the main run's, 95 % intervals over seeds"
        (folder / "differences.svg").write_text(draw_forest(differences, title), encoding="utf-8")
        figure = ["![Differences to the main runs](differences.svg)\n"]
    return [
        f"## Variants at step {step:,}\n",
        "*less main*: paired by seed with the main runs at the same step.\n",
        *figure,
        "![Validation of the variants](variants.svg)\n",
        _table(
            ["variant", "question", "seeds", "mean", less, "pass@n", less, "never trained", less],
            rows,
        ),
    ]


def _has(result: Mapping[str, Any], key: str) -> bool:
    return any(key in row for row in result["validation"])


def _marks(last: int) -> list[int]:
    """Steps of the main table: the start, and each third."""
    return sorted({0, last // 3, 2 * last // 3, last})


def _at(runs: Runs, step: int, key: str) -> Estimate:
    return estimate([around(result, step, key) for result in runs.values()])


def _of(runs: Runs, step: int, prefix: str, tasks: list[str]) -> Estimate:
    """Mean over tasks of a figure, over the runs."""
    return estimate(
        [
            statistics.fmean(around(result, step, prefix + task) for task in tasks)
            for result in runs.values()
        ]
    )


def _late(runs: Runs, key: str) -> Estimate:
    return estimate(
        [around(r, r["steps"], key) - around(r, 2 * r["steps"] // 3, key) for r in runs.values()]
    )


def _categories(result: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Rows of the table: each of Reasoning Gym's categories, then its tasks one by one."""
    first = result["validation"][0]
    tasks = sorted(key.removeprefix("pass/") for key in first if key.startswith("pass/"))
    for category in sorted({category_of(task) for task in tasks}):
        mine = [task for task in tasks if category_of(task) == category]
        yield f"**{category}**", mine
        for task in mine:
            yield task, [task]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
