"""What a person sees while a run trains: a live panel on a terminal, plain lines elsewhere.

Our choice. The view is told what happens and never asks; it shows whatever a row
holds and a dash for what it lacks, since no display may end a run of weeks.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from setproctitle import setproctitle

from prorl_nemo.training.live_panel import panel
from prorl_nemo.training.live_text import Row, duration, printable, show
from prorl_nemo.training.metrics import number
from prorl_nemo.training.watched import Watched

QUIET = ("reset_decision",)  # one a step


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
        self._seen = Watched(printable(recipe_name), printable(model), total_steps)
        self._console = console or Console(file=sys.stdout)
        self._lock = threading.Lock()  # the display draws from a thread of its own
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

    def history(self, rows: Iterable[Row], step: int) -> None:
        """Show what the rows say that are left after a restart from `step`, and nothing of steps
        that are done again."""
        with self._lock:
            self._seen.forget()
            for row in rows:
                if row.get("kind") == "validation":
                    self._seen.take_validation(row)
                else:
                    self._seen.take_step(row)
            self._seen.step = step
            self._seen.step_ends.clear()  # the pause of a restart is not the time of a step

    def plan(self, total_steps: int) -> None:
        """Steps of the whole run, which an early end of a stage makes fewer."""
        with self._lock:
            self._seen.total = total_steps

    def phase(self, name: str, total: float | None = None) -> None:
        """A phase begins; `total` is what `progress` counts towards, if it is known."""
        with self._lock:
            seen = self._seen
            seen.begin_phase(name, total)
            _show_in_ps(f"prorl {seen.name}: step {seen.step + 1}, {seen.phase}")

    def progress(self, done: float, detail: str = "") -> None:
        """How far the running phase is, and a few words (`812 tok/s, 3 rejected`)."""
        with self._lock:
            self._seen.phase_done = number(done) or 0.0
            self._seen.phase_detail = printable(detail)

    def step(self, row: Row) -> None:
        """A training step is done: its metrics row."""
        with self._lock:
            self._seen.take_step(row)
            line = self._step_line(row)
        self._say(line)

    def validation(self, row: Row) -> None:
        """A validation is done: its metrics row."""
        with self._lock:
            self._seen.take_validation(row)
        score = f"{show(row, 'validation/mean', '.3f')} ± {show(row, 'validation/stderr', '.3f')}"
        self._say(f"[{self._place(row)}] validation {score}")

    def event(self, event: Row) -> None:
        """Something happened: a row of events.jsonl."""
        if event.get("event") in QUIET:
            return
        with self._lock:
            text = self._seen.take_event(event)
        self._say(f"[{self._place(event)}] {text}")

    def _render(self) -> RenderableType:
        with self._lock:
            return panel(self._seen, self._spinner)

    def _can_draw(self) -> bool:
        console = self._console
        able = console.is_terminal and not console.is_dumb_terminal
        return able and console.encoding.startswith("utf")

    # -- plain lines

    def _say(self, line: str) -> None:
        if self._live:
            return
        file = self._console.file
        encoding = getattr(file, "encoding", None) or "utf-8"
        # A closed pipe or a full disk under the log file must not end the run.
        with suppress(OSError, ValueError):
            print(line.encode(encoding, "replace").decode(encoding), file=file, flush=True)

    def _place(self, row: Row) -> str:
        return f"{show(row, 'step', 'd')}/{self._seen.total}"

    def _step_line(self, row: Row) -> str:
        parts = [
            f"[{self._seen.step}/{self._seen.total}]",
            f"reward {show(row, 'reward/raw_mean', '.3f')}",
            f"shaped {show(row, 'reward/shaped_mean', '.3f')}",
            f"kept {show(row, 'rollout/kept_share', '.0%')}",
            f"tokens {show(row, 'rollout/response_tokens_mean', '.0f')}"
            f"/{show(row, 'rollout/response_limit', '.0f')}",
            f"truncated {show(row, 'rollout/truncated_share', '.0%')}",
            f"kl {show(row, 'policy/kl', '.2g')}",
            f"entropy {show(row, 'policy/entropy', '.2f')}",
            f"grad {show(row, 'policy/grad_norm', '.2g')}",
            f"mismatch {show(row, 'mismatch/mean_abs', '.1g')}",
            f"{show(row, 'throughput/generated_tokens_per_second', ',.0f')} tok/s",
            f"{show(row, 'time/step', '.1f')} s",
            f"left {duration(self._seen.seconds_left())}",
        ]
        return "  ".join(parts)


def _show_in_ps(title: str) -> None:
    """For ps and top: what a run does can be seen without its terminal.

    The short name, which `setproctitle` sets as well, stays one word: Slurm's proctrack/linuxproc
    cannot read the line in /proc of a process whose name has a space, so it would neither signal
    nor kill it.
    """
    setproctitle(title)
    with suppress(OSError):
        Path("/proc/self/comm").write_text(title.split()[0])
