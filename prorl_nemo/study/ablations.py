"""What each part adds: every variant beside the main runs at the same step, paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from prorl_nemo.study.analysis import (
    around,
    curve,
    difference,
    estimate,
    intervals,
    series,
    verdict,
)
from prorl_nemo.study.blocks import Block, Figure, Heading, Table, Text
from prorl_nemo.study.forest import draw_forest
from prorl_nemo.study.main_run import NEVER, PASS, SCORE
from prorl_nemo.study.panels import Curve, Panel, draw_panels
from prorl_nemo.study.plan import MAIN, Study
from prorl_nemo.study.results import Runs

_LENGTH = "response_tokens_mean"
_COLUMNS = (SCORE, PASS, f"{NEVER}{SCORE}", _LENGTH)


def ablation_blocks(study: Study, found: Mapping[str, Runs]) -> list[Block]:
    """Nothing without a variant and a main run that reach the step of comparison."""
    step = study.compare_at
    reached = {
        name: {seed: result for seed, result in runs.items() if result["steps"] >= step}
        for name, runs in found.items()
    }
    main = reached.get(MAIN, {})
    variants = [v for v in study.variants if v.name != MAIN and reached.get(v.name)]
    if not main or not variants:
        return []
    forest, panels, verdicts = [], [], []
    rows = [_row(MAIN, "All of it", main, {}, step)]
    for variant in variants:
        runs = reached[variant.name]
        rows.append(_row(variant.name, variant.question, runs, main, step))
        # Of the seeds that both have, as their difference: seeds differ by more than variants.
        shared = runs.keys() & main.keys()
        pair = [
            [result for seed, result in of.items() if seed in shared or not shared]
            for of in (main, runs)
        ]
        single = [_mean([r], step, i, thin=True) for i, of in enumerate(pair) for r in of]
        curves = [*single, *(_mean(of, step, i) for i, of in enumerate(pair))]
        panels.append(Panel(variant.name, curves, from_zero=False))
        apart = difference(_at(runs, step, SCORE), _at(main, step, SCORE))
        if apart:
            forest.append((variant.name, apart))
            expected = variant.expected or ""
            verdicts.append([variant.name, expected, verdict(apart, variant.expected)])
    title = f"Mean score at step {step:,} less the main run's{intervals([e for _, e in forest])}"
    compared: list[Block] = (
        [
            Figure("differences", draw_forest(forest, title), title),
            Table(["variant", "the paper expects its score", "verdict"], verdicts),
            Text(
                "One interval in twenty misses by chance alone: of so many variants a single "
                "verdict is a reason to look, not a proof."
            ),
        ]
        if forest
        else []
    )
    beside = "Mean score on trained tasks, runs and their mean: main run (blue), variant (orange)"
    head = ["variant", "question", "seeds"]
    k = next(iter(main.values()))["recipe"]["validation"]["samples"]
    for name in ("mean", f"pass@{k}", "unseen, mean", "tokens"):
        head += [name, "less main"]
    head.append("seconds a step")
    return [
        Heading(f"Variants at step {step:,}"),
        Text(
            "Each changes one thing. *Less main*: paired by seed with the main runs at the same "
            "step; a value is the mean of the last four validations."
        ),
        *compared,
        Figure("variants", draw_panels(panels, beside), beside),
        Table(head, rows),
    ]


def _mean(results: list[Any], step: int, colour: int, thin: bool = False) -> Curve:
    points = [(at, value.mean) for at, value in curve(results, SCORE, last=step)]
    return Curve(points, colour, thin)


def _row(name: str, question: str, runs: Runs, main: Runs, step: int) -> list[str]:
    row = [name, question, str(len(runs))]
    for key in _COLUMNS:
        here = _at(runs, step, key)
        apart = difference(here, _at(main, step, key)) if main else None
        row += [str(estimate(list(here.values()))) if here else "", str(apart) if apart else ""]
    seconds = [
        seconds
        for result in runs.values()
        for at, seconds in series(result, "time/step", "train")
        if at <= step
    ]
    return [*row, f"{statistics.fmean(seconds):.2f}" if seconds else ""]


def _at(runs: Runs, step: int, key: str) -> dict[int, float]:
    return {s: around(r, step, key) for s, r in runs.items() if series(r, key)}
