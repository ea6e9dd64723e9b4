"""Warns when engine and trainer drift apart, and says where to look.

The figures are those of `algorithms.mismatch`. What is usual differs by precision, model and
temperature, so each is held against its own last steps (`usual`, our choice); one limit is
absolute and told at once, because a run may be wrong from its first step on. The causes are those
reported by users of several frameworks: log-probs before temperature, a tied output head left
stale, a rotary embedding that is wrong at long positions, fused kernels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prorl_nemo.schedule.usual import UsualRange

FIGURES = ("mismatch/mean_abs", "mismatch/p99", "mismatch/gen_kl", "mismatch/out_of_bounds_share")
GROWTH = "mismatch/growth"

FAULT = 0.1
"""Mean |d|, nats: more than any precision in use explains (bf16: about 0.02)."""

FACTOR = 2.0
FLOORS = {
    "mismatch/mean_abs": 0.002,
    "mismatch/p99": 0.03,
    "mismatch/gen_kl": 1e-4,
    "mismatch/out_of_bounds_share": 0.005,
}
"""Values at or below these are never a reason to warn: ten times what fp32 shows."""

ENOUGH = 10
"""Steps before a median and a spread are believed."""

POSITION = (
    "it grows with the position: the engine's rotary embedding (its custom op, scaling of long "
    "contexts) or a fused one in the trainer, or the KV cache"
)
STALE = (
    "it came at once: a weight update that did not arrive whole, such as a stale output head of "
    "a tied model (`prorl check`, rollout.verify_weights_every)"
)
TEMPERATURE = (
    "it was so from the beginning: log-probs before temperature instead of processed ones, "
    "another temperature in the trainer, or another chat template or end token"
)
PRECISION = (
    "it came slowly: precision (rollout.precision, rollout.fp32_head) or fused kernels (rope, "
    "bias and activation), which weigh more as the policy sharpens"
)


@dataclass(frozen=True)
class MismatchWarning:
    """For the event log: the figure, its median, the limit, and likely causes, likeliest first."""

    figure: str
    value: float
    usual: float | None
    limit: float
    causes: list[str]


class MismatchWatch:
    """Watches the mismatch of each step.

    Args:
        window: steps that say what is usual.
        pause: steps after a warning in which there is none.
    """

    def __init__(self, window: int = 20, pause: int = 20) -> None:
        self.pause = pause
        self._range = UsualRange(window, ENOUGH)
        self._warned: int | None = None

    def observe(self, step: int, row: Mapping[str, Any]) -> MismatchWarning | None:
        """Take in the figures of a step; absent and non-finite ones are passed over."""
        values = {
            figure: float(row[figure])
            for figure in (*FIGURES, GROWTH)
            if isinstance(row.get(figure), int | float) and math.isfinite(row[figure])
        }
        warnings = [
            warning
            for figure in FIGURES
            if figure in values and (warning := self._take(figure, values))
        ]
        if GROWTH in values:
            self._range.take(GROWTH, values[GROWTH], beyond=False)
        if not warnings or (self._warned is not None and step - self._warned <= self.pause):
            return None
        self._warned = step
        return warnings[0]

    def state_dict(self) -> dict[str, Any]:
        """The whole state, JSON-able."""
        return {"range": self._range.state_dict(), "warned": self._warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._range.load_state_dict(state["range"])
        self._warned = state["warned"]

    def _take(self, figure: str, values: Mapping[str, float]) -> MismatchWarning | None:
        value, usual = values[figure], self._range.of(figure)
        limit = usual.most(FACTOR, FLOORS[figure]) if usual else math.inf
        if figure == "mismatch/mean_abs":
            limit = min(limit, FAULT)
        causes = self._causes(figure, values)
        stays = self._range.take(figure, value, beyond=value > limit)
        at_once = figure == "mismatch/mean_abs" and value > FAULT
        if not stays and not at_once:
            return None
        return MismatchWarning(figure, value, usual.median if usual else None, limit, causes)

    def _causes(self, figure: str, values: Mapping[str, float]) -> list[str]:
        causes = []
        growth, usual = self._range.of(GROWTH), self._range.of(figure)
        if values.get(GROWTH, 1.0) > FACTOR * (growth.median if growth else 1.0):
            causes.append(POSITION)
        before = self._range.before(figure, 3)
        if usual is None or not before:
            return [*causes, TEMPERATURE, STALE]
        # The steps before tell a jump from a slow rise.
        risen = statistics.fmean(before) > 1.3 * usual.median
        return [*causes, PRECISION, STALE] if risen else [*causes, STALE, PRECISION]
