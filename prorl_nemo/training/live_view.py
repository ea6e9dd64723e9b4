"""What a person sees while a run trains: a live panel on a terminal, plain lines elsewhere.

Our choice. The view is told what happens and never asks; it shows whatever a row
holds and a dash for what it lacks, since no display may end a run of weeks.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text
from setproctitle import setproctitle

Row = Mapping[str, Any]

DASH = "–"  # noqa: RUF001 - the typographic dash stands for a missing figure
STOP_HINT = "Ctrl-C saves a checkpoint and stops; the same command goes on from there"
RECENT_STEPS = 20  # enough to smooth validations and checkpoints into the time left
EVENTS_SHOWN = 4

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


class LiveView:
    """Shows one run. Use as a context manager; every method may be called at any time.

    Args:
        recipe_name, model: what the header says.
        total_steps: of the whole run.
        console: where to draw; a terminal gets the live panel, anything else plain lines.
    """

    def __init__(
        self, recipe_name: str, model: str, total_steps: int, console: Console | None = None
    ) -> None:
        self._name = _printable(recipe_name)
        self._model = _printable(model)
        self._total = total_steps
        self._console = console or Console(file=sys.stdout)
        self._lock = threading.Lock()  # the display draws from a thread of its own
        self._started = time.monotonic()
        self._step = 0
        self._stage = ""
        self._row: Row = {}
        self._rewards: list[float] = []
        self._validations: dict[int, Row] = {}
        self._events: deque[str] = deque(maxlen=EVENTS_SHOWN)
        self._step_ends: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._phase = "starting"
        self._phase_started = self._started
        self._phase_done = 0.0
        self._phase_total: float | None = None
        self._phase_detail = ""
        self._spinner = Spinner("dots")
        self._live = (
            Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            if self._can_draw()
            else None
        )

    def __enter__(self) -> LiveView:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def history(self, rows: Iterable[Row]) -> None:
        """Take in the metrics rows from before a restart, so that curves and times go on."""
        for row in rows:
            with self._lock:
                if row.get("kind") == "validation":
                    self._take_validation(row)
                else:
                    self._take_step(row)
        self._step_ends.clear()  # the pause of a restart is not the time of a step

    def phase(self, name: str, total: float | None = None) -> None:
        """A phase begins; `total` is what `progress` counts towards, if it is known."""
        with self._lock:
            self._phase, self._phase_total = _printable(name), _number(total)
            self._phase_done, self._phase_detail = 0.0, ""
            self._phase_started = time.monotonic()
            # For ps and top: what a run does can be seen without its terminal.
            setproctitle(f"prorl {self._name}: step {self._step + 1}, {self._phase}")

    def progress(self, done: float, detail: str = "") -> None:
        """How far the running phase is, and a few words (`812 tok/s, 3 rejected`)."""
        with self._lock:
            self._phase_done, self._phase_detail = _number(done) or 0.0, _printable(detail)

    def step(self, row: Row) -> None:
        """A training step is done: its metrics row."""
        with self._lock:
            self._take_step(row)
            line = self._step_line(row)
        self._say(line)

    def validation(self, row: Row) -> None:
        """A validation is done: its metrics row."""
        with self._lock:
            self._take_validation(row)
        score = f"{_show(row, 'validation/mean', '.3f')} ± {_show(row, 'validation/stderr', '.3f')}"
        self._say(f"[{self._place(row)}] validation {score}")

    def event(self, event: Row) -> None:
        """Something happened: a row of events.jsonl."""
        text = describe_event(event)
        with self._lock:
            self._events.append(f"{_clock(event)}  step {_show(event, 'step', 'd')}  {text}")
            if event.get("event") == "stage_started":
                self._stage = _stage(event)
            elif event.get("event") == "resumed":
                self._step = int(_number(event.get("step")) or self._step)
        self._say(f"[{self._place(event)}] {text}")

    def _take_step(self, row: Row) -> None:
        self._row = row
        self._step = int(_number(row.get("step")) or self._step + 1)
        self._stage = _stage(row) or self._stage
        ended = _number(row.get("time"))
        reward, seconds = _number(row.get("reward/raw_mean")), _number(row.get("time/step"))
        if ended is not None:
            self._step_ends.append((self._step, ended))
        if reward is not None:
            self._rewards.append(reward)
        if seconds is not None:
            self._step_seconds.append(seconds)

    def _take_validation(self, row: Row) -> None:
        if _number(row.get("validation/mean")) is not None:
            self._validations[int(_number(row.get("step")) or 0)] = row

    def _seconds_left(self) -> float | None:
        """Recent wall-clock time per step, validations included, times the steps to go."""
        if len(self._step_ends) > 1:
            (first, start), (last, end) = self._step_ends[0], self._step_ends[-1]
            per_step = (end - start) / max(last - first, 1)
        elif self._step_seconds:
            per_step = sum(self._step_seconds) / len(self._step_seconds)
        else:
            return None
        return max(per_step, 0.0) * max(self._total - self._step, 0)

    # -- plain lines

    def _say(self, line: str) -> None:
        if self._live:
            return
        file = self._console.file
        encoding = getattr(file, "encoding", None) or "utf-8"
        # A closed pipe or a full disk under the log file must not end the run.
        with suppress(OSError, ValueError):
            print(line.encode(encoding, "replace").decode(encoding), file=file, flush=True)

    def _can_draw(self) -> bool:
        console = self._console
        able = console.is_terminal and not console.is_dumb_terminal
        return able and console.encoding.startswith("utf")

    def _place(self, row: Row) -> str:
        return f"{_show(row, 'step', 'd')}/{self._total}"

    def _step_line(self, row: Row) -> str:
        parts = [
            f"[{self._step}/{self._total}]",
            f"reward {_show(row, 'reward/raw_mean', '.3f')}",
            f"shaped {_show(row, 'reward/shaped_mean', '.3f')}",
            f"kept {_show(row, 'rollout/kept_share', '.0%')}",
            f"tokens {_show(row, 'rollout/response_tokens_mean', '.0f')}"
            f"/{_show(row, 'rollout/response_limit', '.0f')}",
            f"truncated {_show(row, 'rollout/truncated_share', '.0%')}",
            f"kl {_show(row, 'policy/kl', '.2g')}",
            f"entropy {_show(row, 'policy/entropy', '.2f')}",
            f"grad {_show(row, 'policy/grad_norm', '.2g')}",
            f"mismatch {_show(row, 'mismatch/mean_abs', '.1g')}",
            f"{_show(row, 'throughput/generated_tokens_per_second', ',.0f')} tok/s",
            f"{_show(row, 'time/step', '.1f')} s",
            f"left {duration(self._seconds_left())}",
        ]
        return "  ".join(parts)

    # -- the live panel

    def _render(self) -> RenderableType:
        with self._lock:
            parts: list[RenderableType] = [self._header(), self._phase_line(), Text()]
            if self._row:
                parts += [self._figures(), Text(), self._times(), Text()]
            parts += [curve for curve in (self._reward_curve(), self._validation_curve()) if curve]
            parts += [Text()] if self._events else []
            parts += [
                Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in self._events
            ]
        title = Text.assemble((f" {self._name} ", "bold"), (f"{self._model} ", "dim"))
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

    def _header(self) -> RenderableType:
        elapsed = time.monotonic() - self._started
        left = Text.assemble("step ", (str(self._step), "bold"), f" of {self._total}")
        if self._stage:
            left.append(f"   {self._stage}", style="cyan")
        right = Text(f"running {duration(elapsed)}   left {duration(self._seconds_left())}")
        line = Table.grid(expand=True)
        line.add_column()
        line.add_column(justify="right")
        line.add_row(left, right)
        bar = Table.grid(expand=True)
        bar.add_row(_bar(self._step, self._total, "cyan"))
        return Group(line, bar)

    def _phase_line(self) -> RenderableType:
        self._spinner.update(text=Text(self._phase, style="bold"))
        words = [duration(time.monotonic() - self._phase_started), self._phase_detail]
        line = Table.grid(padding=(0, 2))
        if self._phase_total and self._phase_total > 0:
            bar = _bar(self._phase_done, self._phase_total, "green", width=24)
            words.insert(0, f"{self._phase_done:g}/{self._phase_total:g}")
            line.add_row(self._spinner, bar, Text("   ".join(words)))
        else:
            line.add_row(self._spinner, Text("   ".join(words)))
        return line

    def _figures(self) -> RenderableType:
        blocks = [
            _block(heading, [(label, _show(self._row, key, spec)) for label, key, spec in figures])
            for heading, figures in FIGURES.items()
        ]
        return Columns(blocks, padding=(0, 4))

    def _times(self) -> RenderableType:
        phases = []
        for phase, speed_key in PHASES.items():
            if _number(self._row.get(f"time/{phase}")) is not None:
                speed = f" at {_show(self._row, speed_key, ',.0f')} tok/s" if speed_key else ""
                phases.append(f"{phase} {_show(self._row, f'time/{phase}', '.1f')} s{speed}")
        total = f"{_show(self._row, 'time/step', '.1f')} s"
        return Text.assemble(
            ("last step  ", "bold cyan"), total, ("   " + ", ".join(phases), "dim")
        )

    def _reward_curve(self) -> RenderableType | None:
        if not self._rewards:
            return None
        ends = f"{self._rewards[0]:.3f} → {self._rewards[-1]:.3f}"
        return _curve("reward", self._rewards, ends, "green")

    def _validation_curve(self) -> RenderableType | None:
        if not self._validations:
            return None
        steps = sorted(self._validations)
        means = [float(self._validations[step]["validation/mean"]) for step in steps]
        best = max(range(len(means)), key=means.__getitem__)
        error = _show(self._validations[steps[-1]], "validation/stderr", ".3f")
        ends = f"{means[0]:.3f} → {means[-1]:.3f} ± {error}, best {means[best]:.3f}"
        return _curve("validation", means, f"{ends} at step {steps[best]}", "cyan")


def describe_event(event: Row) -> str:
    """An event in one line: its name in words, then its details as `key value`."""
    name = str(event.get("event", "event")).replace("_", " ")
    details = [
        f"{key.replace('_', ' ')} {_compact(value)}"
        for key, value in event.items()
        if key not in ("time", "step", "event")
    ]
    return _printable(f"{name}: {', '.join(details)}" if details else name)


def duration(seconds: float | None) -> str:
    """`8 s`, `12 m 31 s`, `3 h 12 m`, `2 d 5 h`; a dash for None."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} m"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as at most `width` block characters, each the mean of an equal share of them."""
    count = min(width, len(values))
    if count < 1:
        return ""
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    blocks = "▁▂▃▄▅▆▇█"
    if high == low:
        return blocks[3] * count
    return "".join(blocks[round((mean - low) / (high - low) * 7)] for mean in means)


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


def _stage(row: Row) -> str:
    number, name = _number(row.get("stage")), row.get("stage_name")
    parts = [f"stage {int(number) + 1}"] if number is not None else []
    return _printable(" ".join([*parts, str(name)] if name else parts))


def _clock(event: Row) -> str:
    with suppress(OverflowError, OSError, ValueError):
        return time.strftime("%H:%M", time.localtime(_number(event.get("time"))))
    return "--:--"


def _number(value: Any) -> float | None:
    """The value if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with suppress(OverflowError):  # an int beyond float's range
        return float(value) if math.isfinite(value) else None
    return None


def _show(row: Row, key: str, spec: str) -> str:
    value = _number(row.get(key))
    if value is None:
        return DASH
    return format(int(value) if spec == "d" else value, spec)


def _compact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_compact(item)}" for key, item in value.items())
    return str(value)


def _printable(text: str) -> str:
    """Without control characters, which could move the cursor of a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))
