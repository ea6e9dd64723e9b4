"""Early warning of a collapse: a figure that leaves the range it has kept to.

A collapsing policy shows it first in entropy (no exploration, or noise), in length and
truncation (it no longer ends), and in repetition, often hundreds of steps before validation falls
(ProRL, arXiv 2505.24864, section 4.2, on run 3). The thresholds are our choice: a figure is held
against its own last steps (`usual`), since what is usual differs by model and stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prorl_nemo.schedule.usual import Usual, UsualRange


@dataclass(frozen=True)
class Limit:
    """How far a figure may go.

    Attributes:
        above, below: factors of the median that are usual in any case; None: any value is.
        floor: values at or below it are never too high.
    """

    above: float | None = None
    below: float | None = None
    floor: float = 0.0


LIMITS: dict[str, Limit] = {
    "policy/entropy": Limit(above=2.0, below=0.33, floor=0.05),
    "rollout/response_tokens_mean": Limit(above=1.8, below=0.4),
    "rollout/repetition_share": Limit(above=2.0, floor=0.05),
    "rollout/truncated_share": Limit(above=2.0, floor=0.2),
}


@dataclass(frozen=True)
class CollapseWarning:
    """A figure beyond its limit, for the event log."""

    figure: str
    value: float
    usual: float
    limit: float


class CollapseWatch:
    """Watches the figures of each step.

    Args:
        window: steps that say what is usual; nothing is judged before it is full.
        pause: steps in which a figure that has warned is silent.
    """

    def __init__(self, window: int = 20, pause: int = 20) -> None:
        self.pause = pause
        self._range = UsualRange(window, enough=window)
        self._warned: dict[str, int] = {}

    def observe(self, step: int, row: Mapping[str, Any]) -> list[CollapseWarning]:
        """Take in a step's figures; absent and non-finite ones are passed over."""
        found = []
        for figure, limit in LIMITS.items():
            value = row.get(figure)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                continue
            usual = self._range.of(figure)
            warning = _judge(figure, float(value), usual, limit) if usual else None
            stays = self._range.take(figure, float(value), warning is not None)
            quiet = step - self._warned.get(figure, step - self.pause - 1) <= self.pause
            if warning and stays and not quiet:
                self._warned[figure] = step
                found.append(warning)
        return found

    def new_stage(self) -> None:
        """Forget what was usual: another limit or temperature has its own."""
        self._range.clear()

    def state_dict(self) -> dict[str, Any]:
        """The whole state, JSON-able."""
        return {"range": self._range.state_dict(), "warned": dict(self._warned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._range.load_state_dict(state["range"])
        self._warned = dict(state["warned"])


def _judge(figure: str, value: float, usual: Usual, limit: Limit) -> CollapseWarning | None:
    if limit.above is not None and value > (most := usual.most(limit.above, limit.floor)):
        return CollapseWarning(figure, value, usual.median, most)
    if limit.below is not None and value < (least := usual.least(limit.below)):
        return CollapseWarning(figure, value, usual.median, least)
    return None
