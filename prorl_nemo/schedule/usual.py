"""What is usual for a figure: the median of its own last steps, and how far they lie from it.

Our choice. What is usual differs by model, precision and stage, so no range is fixed. A factor of
the median alone is not enough where batches are small, whose figures jump by half from step to
step: it would warn every few dozen steps of a sound run, and nobody would read it. Hence the
spread, and two steps in a row. A fault stays, so it is told one step later.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SPREADS = 4.0
"""Spreads from the median within which a value is usual."""

IN_A_ROW = 2
"""Steps beyond the range before it is told."""

_NORMAL = 1.4826
"""Median absolute deviation to standard deviation, of a normal distribution."""


@dataclass(frozen=True)
class Usual:
    """Median of a figure's last steps, and their spread: the standard deviation, by the median
    absolute deviation, which single steps beyond the range do not widen."""

    median: float
    spread: float

    def most(self, factor: float, floor: float = 0.0) -> float:
        """The highest usual value: a factor of the median, or the spread, or the floor."""
        return max(factor * self.median, self.median + SPREADS * self.spread, floor)

    def least(self, factor: float) -> float:
        """The lowest usual value of a positive figure: as many times below the median as `most` is
        above it, for a distance below would soon be less than nothing."""
        reach = self.median + SPREADS * self.spread
        return min(factor * self.median, self.median**2 / reach if reach else 0.0)


class UsualRange:
    """The last values of some figures.

    Args:
        window: steps that are remembered.
        enough: steps before anything is called usual.
    """

    def __init__(self, window: int, enough: int) -> None:
        self.window, self.enough = window, enough
        self._history: dict[str, list[float]] = {}
        self._beyond: dict[str, int] = {}

    def of(self, figure: str) -> Usual | None:
        """What is usual; None before there are `enough` steps."""
        history = self._history.get(figure, [])
        if len(history) < self.enough:
            return None
        median = statistics.median(history)
        spread = _NORMAL * statistics.median([abs(value - median) for value in history])
        return Usual(median, spread)

    def before(self, figure: str, steps: int) -> list[float]:
        """The last values before those, if any, that are beyond the range in a row."""
        history = self._history.get(figure, [])
        end = max(len(history) - self._beyond.get(figure, 0), 0)
        return history[max(end - steps, 0) : end]

    def take(self, figure: str, value: float, beyond: bool) -> bool:
        """Remember a step's value. Whether it is at least the second in a row beyond the range."""
        history = self._history.setdefault(figure, [])
        history.append(value)
        del history[: -self.window]
        self._beyond[figure] = self._beyond.get(figure, 0) + 1 if beyond else 0
        return self._beyond[figure] >= IN_A_ROW

    def clear(self) -> None:
        """Forget all: what comes has another range."""
        self._history.clear()
        self._beyond.clear()

    def state_dict(self) -> dict[str, Any]:
        """The whole state, JSON-able."""
        return {
            "history": {figure: list(values) for figure, values in self._history.items()},
            "beyond": dict(self._beyond),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._history = {figure: list(values) for figure, values in state["history"].items()}
        self._beyond = dict(state["beyond"])
