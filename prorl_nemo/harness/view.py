"""The live table of an evaluation; plain lines where there is no terminal. It may end nothing."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prorl_nemo.evaluation.suite import Suite
from prorl_nemo.evaluation.tables import MISSING

_LINE_SECONDS = 20.0


@dataclass
class _Tally:
    total: int
    strict: bool
    done: int = 0
    no_answer: int = 0
    truncated: int = 0
    tokens: int = 0
    by_item: dict[str, list[float]] = field(default_factory=dict)

    def score(self) -> tuple[float, float] | None:
        """Mean over the items that have samples, and its standard error over them."""
        means = [math.fsum(scores) / len(scores) for scores in self.by_item.values()]
        if not means:
            return None
        mean, count = math.fsum(means) / len(means), len(means)
        spread = math.fsum((value - mean) ** 2 for value in means)
        return mean, math.sqrt(spread / (count - 1) / count) if count > 1 else 0.0


class EvaluationView:
    """Shows how far every benchmark is. Use as a context manager.

    Args:
        title: model and protocol.
        console: a terminal gets the table, anything else a line now and then.
    """

    def __init__(self, suite: Suite, title: str, console: Console) -> None:
        self._title = title
        self._console = console
        self._lock = threading.Lock()  # The display draws from a thread of its own.
        self._tallies = {
            part.benchmark.name: _Tally(len(part.items.items) * part.samples, part.strict)
            for part in suite.parts
        }
        self._began: float | None = None
        self._fresh = self._tokens = self._under_way = self._ungraded = 0
        self._said = time.monotonic()
        self._phase = ""
        self._live = (
            Live(get_renderable=self._render, console=console, refresh_per_second=2)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> EvaluationView:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()
        else:
            self._say()

    def phase(self, name: str) -> None:
        """What happens now, in a word or two; empty while samples are made."""
        with self._lock:
            self._phase = name
        if name and self._live is None:
            self._console.print(Text(f"{name} ..."))

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text), soft_wrap=True)

    def sample(self, row: Mapping[str, Any], fresh: bool = True) -> None:
        """A sample is graded. `fresh`: in this start, not in an earlier one."""
        with self._lock:
            tally = self._tallies.get(str(row["benchmark"]))
            if tally is None:
                return
            tally.done += 1
            tally.no_answer += row["verdict"] == "no_answer"
            tally.truncated += row["truncated"]
            tally.tokens += row["tokens"]
            score = float(row["score"] == 1.0) if tally.strict else row["score"]
            tally.by_item.setdefault(str(row["item"]), []).append(score)
            self._fresh += fresh

    def progress(self, tokens: int, under_way: int, ungraded: int) -> None:
        """Tokens generated in this start, requests that the engines have, and responses that
        wait for a grader."""
        with self._lock:
            self._began = self._began or time.monotonic()
            self._tokens, self._under_way, self._ungraded = tokens, under_way, ungraded
        if self._live is None and time.monotonic() - self._said > _LINE_SECONDS:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        done = sum(tally.done for tally in self._tallies.values())
        total = sum(tally.total for tally in self._tallies.values())
        self._console.print(Text(f"{done} of {total} samples, {self._pace()}"), soft_wrap=True)

    def _pace(self) -> str:
        seconds = time.monotonic() - self._began if self._began is not None else 0.0
        if seconds < 1:
            return self._phase or "starting"
        total = sum(tally.total for tally in self._tallies.values())
        done = sum(tally.done for tally in self._tallies.values())
        left = (total - done) * seconds / self._fresh if self._fresh else None
        about = MISSING if left is None else f"{left / 60:,.0f} min left"
        return (
            f"{self._tokens / seconds:,.0f} tokens/s, {self._under_way} under way, "
            f"{self._ungraded} to grade, {about}"
        )

    def _render(self) -> RenderableType:
        with self._lock:
            table = Table("benchmark", box=None, padding=(0, 2, 0, 0))
            for column in ("done", "of", "score", "± items", "no answer", "truncated", "tokens"):
                table.add_column(column, justify="right")
            for name, tally in self._tallies.items():
                score, n = tally.score(), max(tally.done, 1)
                table.add_row(
                    name,
                    f"{tally.done:,}",
                    f"{tally.total:,}",
                    MISSING if score is None else f"{100 * score[0]:.1f}",
                    MISSING if score is None else f"{100 * score[1]:.1f}",
                    f"{tally.no_answer / n:.0%}" if tally.done else MISSING,
                    f"{tally.truncated / n:.0%}" if tally.done else MISSING,
                    f"{tally.tokens / n:,.0f}" if tally.done else MISSING,
                )
            pace = self._phase or self._pace()
            return Group(Text(self._title, "bold"), table, Text(pace, "dim"))
