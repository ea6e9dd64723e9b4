"""What the main runs show: curves, the late rise, the paper's claims, how training went."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from prorl_nemo.reporting.figure import draw
from prorl_nemo.study.analysis import (
    Estimate,
    around,
    curve,
    estimate,
    intervals,
    series,
    verdict,
    window,
)
from prorl_nemo.study.blocks import Block, Cards, Figure, Heading, Table, Text
from prorl_nemo.study.forest import draw_forest
from prorl_nemo.study.panels import Curve, Panel, draw_panels
from prorl_nemo.study.results import Runs
from prorl_nemo.study.solvable import crossings, probed, solvable_blocks, task_name

SCORE, PASS = "mean", "pass"
NEVER = "never_trained/"

_TRAINING = {
    "policy/entropy": "entropy, nats a token",
    "policy/kl": "KL to the reference, nats a token",
    "rollout/response_tokens_mean": "response, tokens",
    "rollout/kept_share": "share of groups with signal",
    "rollout/truncated_share": "share of responses cut",
    "mismatch/mean_abs": "engine against trainer, nats",
    "policy/clip_share_high": "share of tokens clipped above",
    "policy/clip_share_low": "share of tokens clipped below",
    "policy/grad_norm": "gradient norm",
    "reward/raw_mean": "score on training prompts",
    "time/step": "seconds of a step",
}


def main_blocks(runs: Runs) -> list[Block]:
    """The main runs' part of the page, up to the last step that all of them have."""
    results = list(runs.values())
    last = min(result["steps"] for result in results)
    names = _names(results[0])
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    k = results[0]["recipe"]["validation"]["samples"]
    blocks: list[Block] = [
        _cards(runs, names, last),
        Heading("The main run"),
        Text(
            f"{seeds}, {last:,} steps. Validation on held-out prompts: the mean score of their "
            "samples, and the share of prompts with a right one among them. *Unseen*: tasks that "
            "are never trained on. In tables a value is the mean of the last four validations up "
            "to its step, and at step 0 the only one. A validation has the response limit of its "
            f"stage: {_limits(results[0])}."
        ),
        *_score_figure("main", SCORE, f"Mean score on held-out prompts, {seeds}", runs),
        *_score_figure("pass", PASS, f"Prompts with a right one of {k} samples, {seeds}", runs),
        _by_step(runs, names, last),
        Heading("What the paper claims, and what was seen", 3),
        _claims(runs, last),
        Text(f"Gain over the run: {_two_limits(results[0], 0, last)}"),
        Heading("Does it still rise late?", 3),
        Text(
            f"Gain from step {_two_thirds(last):,} to step {last:,}, paired by seed: "
            + _two_limits(results[0], _two_thirds(last), last)
        ),
        _late_figure(runs, last),
    ]
    if any(_categories(results[0])):
        blocks += [
            Heading("By category and task", 3),
            Text("A category is the mean of its tasks, unseen ones too."),
            _category_figure(results),
            _by_category(runs, last),
        ]
    if probed(runs):
        blocks += solvable_blocks(runs)
    return [*blocks, *_training_blocks(runs)]


def _names(result: dict[str, Any]) -> dict[str, str]:
    """The four figures of a validation that the run has, and what they are called."""
    k = result["recipe"]["validation"]["samples"]
    names = {
        SCORE: "trained, mean",
        PASS: f"trained, pass@{k}",
        f"{NEVER}{SCORE}": "unseen, mean",
        f"{NEVER}{PASS}": f"unseen, pass@{k}",
    }
    return {key: name for key, name in names.items() if series(result, key)}


def _score_figure(file: str, score: str, title: str, runs: Runs) -> list[Block]:
    """A score's curves on trained and unseen tasks, if the runs have it."""
    results = list(runs.values())
    curves, shown = [], []
    for name, key in (("trained", score), ("unseen", NEVER + score)):
        if points := curve(results, key):
            curves.append((name, [(step, e.mean, *e.within(0.0, 1.0)) for step, e in points]))
            shown += [found for _, found in points]
    title += intervals(shown)
    return [Figure(file, draw(curves, title), title)] if curves else []


def _two_thirds(last: int) -> int:
    return 2 * last // 3


def _at(runs: Runs, step: int, keys: Sequence[str]) -> Estimate:
    """Mean of the figures at a step, over the runs."""
    return estimate([_mean(result, step, keys) for result in runs.values()])


def _gain(runs: Runs, before: int, after: int, keys: Sequence[str]) -> Estimate:
    """The same of the change between two steps of a run."""
    return estimate(
        [_mean(result, after, keys) - _mean(result, before, keys) for result in runs.values()]
    )


def _mean(result: dict[str, Any], step: int, keys: Sequence[str]) -> float:
    return statistics.fmean(around(result, step, key) for key in keys)


def _cards(runs: Runs, names: dict[str, str], last: int) -> Cards:
    cards = []
    for key in (SCORE, f"{NEVER}{SCORE}"):
        if key in names:
            start, end = _at(runs, 0, [key]).mean, _at(runs, last, [key]).mean
            gain = _gain(runs, 0, last, [key])
            cards.append((names[key], f"{start:.3f} → {end:.3f}", f"gain {gain}"))
    late = _gain(runs, _two_thirds(last), last, [SCORE])
    cards.append(("gain of the last third", str(late), f"from step {_two_thirds(last):,}, trained"))
    if probed(runs):
        found = crossings(runs)
        note = f"of {found[0].prompts} prompts, beyond chance, mean over seeds"
        for label, of in (("newly solved", "solved_surely"), ("lost", "lost_surely")):
            cards.append((label, f"{statistics.fmean(getattr(c, of) for c in found):.1f}", note))
    minutes = statistics.fmean(result["training_seconds"] for result in runs.values()) / 60
    begun, killed = (sum(r["starts"][of] for r in runs.values()) for of in ("begun", "killed"))
    note = f"mean; runs: {len(runs)}, begun: {begun}, killed: {killed}"
    cards.append(("time of a run", f"{minutes:.0f} min", note))
    return Cards(cards)


def _by_step(runs: Runs, names: dict[str, str], last: int) -> Table:
    marks = sorted({0, last // 3, _two_thirds(last), last})
    return Table(
        ["", *(f"step {step:,}" for step in marks), "gain", "of the last third"],
        [
            [
                name,
                *(str(_at(runs, step, [key])) for step in marks),
                *(str(_gain(runs, start, last, [key])) for start in (0, _two_thirds(last))),
            ]
            for key, name in names.items()
        ],
    )


def _claims(runs: Runs, last: int) -> Table:
    """The paper's claims of prolonged RL, each against an interval over the seeds."""
    rows = [
        ("validation rises over the run", _gain(runs, 0, last, [SCORE])),
        ("it still rises in the last third", _gain(runs, _two_thirds(last), last, [SCORE])),
    ]
    unseen = f"{NEVER}{SCORE}"
    if all(series(result, unseen) for result in runs.values()):
        rows.append(("tasks never trained on gain as well", _gain(runs, 0, last, [unseen])))
    if probed(runs):
        share = [(c.solved_surely - c.lost_surely) / c.prompts for c in crossings(runs)]
        rows.append(("more becomes solvable than is lost (share of prompts)", estimate(share)))
    return Table(
        ["ProRL's claim", "here", "verdict"],
        [[claim, str(seen), verdict(seen, "higher")] for claim, seen in rows],
    )


def _limits(result: dict[str, Any]) -> str:
    """Response limits, and the steps up to which they hold."""
    by_step = _limit_by_step(result)
    ends = [step for step in range(1, len(by_step)) if by_step[step] != by_step[step - 1]]
    return ", ".join(
        f"{by_step[end - 1]} tokens up to step {end:,}" for end in [*ends, len(by_step)]
    )


def _two_limits(result: dict[str, Any], first: int, last: int) -> str:
    """Says so where the validations averaged at two steps had different response limits."""
    by_step = _limit_by_step(result)
    before, after = (
        " and ".join(dict.fromkeys(str(by_step[max(0, at - 1)]) for at, _ in averaged))
        for averaged in (window(result, step, SCORE) for step in (first, last))
    )
    if before == after and " and " not in after:
        return f"both ends are measured with {after} tokens of response."
    return f"the response limit differs, {before} tokens at its start, {after} at its end."


def _limit_by_step(result: dict[str, Any]) -> list[int]:
    """Of steps 1, 2, ... of the run, whose stages may have ended early."""
    recipe, events = result["recipe"], result["events"]
    starts = {e["step"]: e["stage"] for e in events if e["event"] == "stage_started"}
    limits: list[int] = []
    stage = 0
    for step in range(1, result["steps"] + 1):
        stage = starts.get(step, stage)
        own = recipe["stages"][stage]["max_response_tokens"]
        limits.append(own or recipe["rollout"]["max_response_tokens"])
    return limits


def _late_figure(runs: Runs, last: int) -> Figure:
    result = next(iter(runs.values()))
    rows = {name: [key] for key, name in _names(result).items()} | dict(_categories(result))
    gains = [(name, _gain(runs, _two_thirds(last), last, keys)) for name, keys in rows.items()]
    title = f"Gain of the last third{intervals([found for _, found in gains])}"
    return Figure("late", draw_forest(gains, title), title)


def _categories(result: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Reasoning Gym's categories with their validated tasks."""
    tasks = {name: of for name, of in result["tasks"].items() if name in result["validation"]}
    for category in sorted({of["category"] for of in tasks.values()}):
        yield category, sorted(name for name, of in tasks.items() if of["category"] == category)


def _category_figure(results: list[dict[str, Any]]) -> Figure:
    panels = []
    for category, tasks in _categories(results[0]):
        curves = []
        for colour, prefix in enumerate(("", "pass/")):
            of_tasks = [dict(curve(results, prefix + task)) for task in tasks]
            # Steps that all tasks have: a prompt may be dropped, and its task with it.
            points = [
                (step, statistics.fmean(each[step].mean for each in of_tasks))
                for step in of_tasks[0]
                if all(step in each for each in of_tasks)
            ]
            curves += [Curve(points, colour)] if points else []
        panels.append(Panel(category, curves))
    title = "By category: mean score (blue), share of prompts with a right sample (orange)"
    return Figure("categories", draw_panels(panels, title), title)


def _by_category(runs: Runs, last: int) -> Table:
    first = next(iter(runs.values()))
    k = first["recipe"]["validation"]["samples"]
    rows = []
    for category, tasks in _categories(first):
        named = [(f"**{category}**", tasks), *((task_name(first, task), [task]) for task in tasks)]
        for name, of in named:
            row = [name]
            for keys in (of, [f"pass/{task}" for task in of]):
                row += [str(_at(runs, step, keys)) for step in (0, last)]
                row.append(str(_gain(runs, 0, last, keys)))
            rows.append(row)
    head = [f"{of}{when}" for of in ("mean", f"pass@{k}") for when in (", start", ", end", " gain")]
    return Table(["", *head], rows)


def _training_blocks(runs: Runs) -> list[Block]:
    results = list(runs.values())
    resets = [_resets(result) for result in results]
    marks = [step for step, _ in resets[0]]
    panels = []
    for key, name in _TRAINING.items():
        seeds = [series(result, key, "train") for result in results] if len(results) > 1 else []
        mean = [(step, found.mean) for step, found in curve(results, key, "train")]
        curves = [Curve(points, 0, thin=True) for points in seeds if points]
        panels.append(Panel(name, [*curves, Curve(mean)] if mean else curves, marks))
    title = "Training, each seed and their mean"
    rows = [
        [
            f"seed {seed}",
            f"{result['steps']:,}",
            f"{result['training_seconds'] / 60:.0f} min",
            str(result["starts"]["begun"]),
            str(result["starts"]["killed"]),
            ", ".join(map(str, result["starts"]["resumed_at"])) or "never",
            f"{_generated(result) / 1e6:.1f} M",
            str(result["rows_lost"]),
            result["processor"],
        ]
        for seed, result in runs.items()
    ]
    head = ["", "steps", "time", "begun", "killed", "resumed from step"]
    head += ["tokens generated", "rows lost", "machine"]
    why = [
        [f"seed {seed}", str(len(of_seed)), ", ".join(f"{step:,} ({why})" for step, why in of_seed)]
        for seed, of_seed in zip(runs, resets, strict=True)
    ]
    return [
        Heading("How training went", 3),
        Text("Means over ten steps. Dotted: resets of the reference, of the first seed."),
        Figure("training", draw_panels(panels, title), title),
        Table(head, rows),
        Table(["", "resets", "after step (why)"], why),
    ]


def _resets(result: dict[str, Any]) -> list[tuple[int, str]]:
    """Step and trigger of each."""
    return [
        (event["step"], event["trigger"].replace("_", " "))
        for event in result["events"]
        if event["event"] == "reference_reset"
    ]


def _generated(result: dict[str, Any]) -> float:
    """Response tokens of all training steps, from their means over stretches."""
    total, before = 0.0, 0
    for step, mean in series(result, "rollout/generated_tokens", "train"):
        total += mean * (step - before)
        before = step
    return total
