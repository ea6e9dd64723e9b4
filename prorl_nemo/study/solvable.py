"""What hundreds of samples solve before the first step and after the last one."""

from __future__ import annotations

import statistics
from typing import Any

from prorl_nemo.study.analysis import Crossing, by_task, crossing, estimate, pass_at, sure_count
from prorl_nemo.study.blocks import Block, Heading, Table, Text
from prorl_nemo.study.results import Runs

_KS = (1, 4, 16, 64, 256, 1024)


def probed(runs: Runs) -> bool:
    return all(result["probe"] for result in runs.values())


def crossings(runs: Runs, task: str | None = None) -> list[Crossing]:
    """Of each run, or of one task of each."""
    found = []
    for result in runs.values():
        probe = result["probe"]
        start, end = probe["start"], probe["end"]
        if task:
            start, end = by_task(start).get(task, {}), by_task(end).get(task, {})
        found.append(crossing(start, end, probe["samples"]))
    return found


def solvable_blocks(runs: Runs) -> list[Block]:
    """Prompts newly solved and lost, by task, and pass@k up to all samples."""
    first = next(iter(runs.values()))
    samples = first["probe"]["samples"]
    fields = ("prompts", "solved", "solved_surely", "lost", "lost_surely", "never")
    rows = []
    for task in [None, *sorted(by_task(first["probe"]["start"]))]:
        found = crossings(runs, task)
        means = [statistics.fmean(getattr(c, field) for c in found) for field in fields]
        name = task_name(first, task) if task else "**all**"
        rows.append([name, *(f"{mean:.1f}" for mean in means)])
    return [
        Heading(f"What {samples} samples solve, before and after", 3),
        Text(
            f"Prompts, mean over seeds; {first['probe']['response_limit']} tokens of response "
            f"before and after. *Newly solved*: none of {samples} samples was right before "
            f"the first step, and one after the last; *beyond chance*: {sure_count(samples)} or "
            "more of them. *Lost*: the other way round. The first model was asked once for all "
            "seeds, so intervals hold what training varies, not which of its samples were right."
        ),
        Table(
            ["task", "prompts", "newly solved", "beyond chance", "lost", "beyond chance", "never"],
            rows,
        ),
        Text("Chance that one of k samples is right, mean over prompts:"),
        _pass_table(runs, samples),
    ]


def task_name(result: dict[str, Any], task: str) -> str:
    """The task, marked where it is never trained on."""
    of = result["tasks"].get(task)
    return f"{task} (unseen)" if of and not of["trained"] else task


def _pass_table(runs: Runs, samples: int) -> Table:
    first = next(iter(runs.values()))
    ks = [k for k in _KS if k <= samples]
    rows = []
    for trained, name in ((True, "trained"), (False, "unseen")):
        tasks = {task for task, of in first["tasks"].items() if of["trained"] == trained}
        for when in ("start", "end"):
            right = [_right(result, when, tasks) for result in runs.values()]
            if when == "start" and all(counts == right[0] for counts in right):
                right = right[:1]  # One model, asked once: no interval.
            if all(right):
                means = [[pass_at(counts, samples, k) for counts in right] for k in ks]
                rows.append([f"{name}, {when}", *(str(estimate(of_k)) for of_k in means)])
    return Table(["", *(f"pass@{k}" for k in ks)], rows)


def _right(result: dict[str, Any], when: str, tasks: set[str]) -> list[int]:
    counts = by_task(result["probe"][when])
    return [count for task in sorted(tasks) for count in counts.get(task, {}).values()]
