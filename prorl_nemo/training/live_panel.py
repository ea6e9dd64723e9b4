"""The live panel of a terminal: where the run is, its figures, times, curves and last events."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from prorl_nemo.training.live_text import duration, show, sparkline
from prorl_nemo.training.metrics import number
from prorl_nemo.training.watched import Watched

STOP_HINT = "Ctrl-C saves a checkpoint and stops; the same command goes on from there"
# Heading -> (label, metrics key, format).
FIGURES: dict[str, list[tuple[str, str, str]]] = {
    "reward": [
        ("raw", "reward/raw_mean", ".3f"),
        ("shaped", "reward/shaped_mean", ".3f"),
        ("groups kept", "rollout/kept_share", ".0%"),
        ("flattened", "shaping/dropped_groups", ",.0f"),
    ],
    "responses": [
        ("mean tokens", "rollout/response_tokens_mean", ",.0f"),
        ("longest", "rollout/response_tokens_max", ",.0f"),
        ("limit", "rollout/response_limit", ",.0f"),
        ("truncated", "rollout/truncated_share", ".1%"),
    ],
    "policy": [
        ("KL", "policy/kl", ".3g"),
        ("entropy", "policy/entropy", ".3f"),
        ("clipped low", "policy/clip_share_low", ".2%"),
        ("clipped high", "policy/clip_share_high", ".2%"),
        ("grad norm", "policy/grad_norm", ".3g"),
    ],
    "engine mismatch": [
        ("mean", "mismatch/mean_abs", ".2g"),
        ("p99", "mismatch/p99", ".2g"),
        ("out of bounds", "mismatch/out_of_bounds_share", ".2%"),
    ],
}
# Phase -> metrics key of its tokens per second, where it has one.
PHASES: dict[str, str | None] = {
    "generate": "throughput/generated_tokens_per_second",
    "logprobs": None,
    "reference": None,
    "train": "throughput/trained_tokens_per_second",
    "sync": None,
    "checkpoint": None,
}


def panel(seen: Watched, spinner: Spinner) -> RenderableType:
    """The panel as it is now; `spinner` goes on turning between two of them."""
    parts: list[RenderableType] = [_header(seen), _phase_line(seen, spinner), Text()]
    if seen.row:
        parts += [_figures(seen), Text(), _times(seen), Text()]
    parts += [curve for curve in (_reward_curve(seen), _validation_curve(seen)) if curve]
    parts += [Text()] if seen.events else []
    parts += [Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in seen.events]
    title = Text.assemble((f" {seen.name} ", "bold"), (f"{seen.model} ", "dim"))
    hint = Text(f" {STOP_HINT} ", style="dim")
    return Panel(
        Group(*parts),
        title=title,
        title_align="left",
        subtitle=hint,
        subtitle_align="left",
        border_style="cyan",
        padding=(0, 2),
    )


def _header(seen: Watched) -> RenderableType:
    elapsed = time.monotonic() - seen.started
    left = Text.assemble("step ", (str(seen.step), "bold"), f" of {seen.total}")
    if seen.stage:
        left.append(f"   {seen.stage}", style="cyan")
    right = Text(f"running {duration(elapsed)}   left {duration(seen.seconds_left())}")
    line = Table.grid(expand=True)
    line.add_column()
    line.add_column(justify="right")
    line.add_row(left, right)
    bar = Table.grid(expand=True)
    bar.add_row(_bar(seen.step, seen.total, "cyan"))
    return Group(line, bar)


def _phase_line(seen: Watched, spinner: Spinner) -> RenderableType:
    spinner.update(text=Text(seen.phase, style="bold"))
    words = [duration(time.monotonic() - seen.phase_started), seen.phase_detail]
    line = Table.grid(padding=(0, 2))
    if seen.phase_total and seen.phase_total > 0:
        bar = _bar(seen.phase_done, seen.phase_total, "green", width=24)
        words.insert(0, f"{seen.phase_done:g}/{seen.phase_total:g}")
        line.add_row(spinner, bar, Text("   ".join(words)))
    else:
        line.add_row(spinner, Text("   ".join(words)))
    return line


def _figures(seen: Watched) -> RenderableType:
    blocks = [
        _block(heading, [(label, show(seen.row, key, spec)) for label, key, spec in figures])
        for heading, figures in FIGURES.items()
    ]
    return Columns(blocks, padding=(0, 4))


def _times(seen: Watched) -> RenderableType:
    phases = []
    for phase, speed_key in PHASES.items():
        if number(seen.row.get(f"time/{phase}")) is not None:
            speed = f" at {show(seen.row, speed_key, ',.0f')} tok/s" if speed_key else ""
            phases.append(f"{phase} {show(seen.row, f'time/{phase}', '.1f')} s{speed}")
    total = f"{show(seen.row, 'time/step', '.1f')} s"
    return Text.assemble(("last step  ", "bold cyan"), total, ("   " + ", ".join(phases), "dim"))


def _reward_curve(seen: Watched) -> RenderableType | None:
    if not seen.rewards:
        return None
    ends = f"{seen.rewards[0]:.3f} → {seen.rewards[-1]:.3f}"
    return _curve("reward", seen.rewards, ends, "green")


def _validation_curve(seen: Watched) -> RenderableType | None:
    if not seen.validations:
        return None
    steps = sorted(seen.validations)
    means = [float(seen.validations[step]["validation/mean"]) for step in steps]
    best = max(range(len(means)), key=means.__getitem__)
    error = show(seen.validations[steps[-1]], "validation/stderr", ".3f")
    ends = f"{means[0]:.3f} → {means[-1]:.3f} ± {error}, best {means[best]:.3f}"
    return _curve("validation", means, f"{ends} at step {steps[best]}", "cyan")


def _block(heading: str, lines: list[tuple[str, str]]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim")
    table.add_column(justify="right")
    for label, value in lines:
        table.add_row(label, value)
    return Group(Text(heading, style="bold cyan"), table)


def _bar(done: float, total: float, style: str, width: int | None = None) -> RenderableType:
    share = min(max(done / total, 0.0), 1.0) if total > 0 else 0.0
    return ProgressBar(total=1.0, completed=share, width=width, complete_style=style)


def _curve(label: str, values: Sequence[float], ends: str, style: str) -> RenderableType:
    return Text.assemble(
        (f"{label:<12}", "dim"),
        (sparkline(values, 32), style),
        f"  {ends}",
        no_wrap=True,
        overflow="ellipsis",
    )
