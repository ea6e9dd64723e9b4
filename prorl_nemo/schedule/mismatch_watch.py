"""Warns when engine and trainer drift apart, and says where to look.

The figures are those of `algorithms.mismatch`. What is usual differs by precision, model and
temperature, so each is held against the median of its own last steps (our choice); one limit is
absolute, because a run may be wrong from its first step on. The causes are those reported by users
of several frameworks: log-probs before temperature, a tied output head left stale, a rotary
embedding that is wrong at long positions, fused kernels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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

ENOUGH = 5
"""Steps before a median is believed."""

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
        window: steps the median is taken over.
        pause: steps after a warning in which there is none.
    """

    def __init__(self, window: int = 20, pause: int = 20) -> None:
        self.window, self.pause = window, pause
        self._history: dict[str, list[float]] = {}
        self._warned: int | None = None

    def observe(self, step: int, row: Mapping[str, Any]) -> MismatchWarning | None:
        """Take in the figures of a step; absent and non-finite ones are passed over."""
        values = {
            figure: float(row[figure])
            for figure in (*FIGURES, GROWTH)
            if isinstance(row.get(figure), int | float) and math.isfinite(row[figure])
        }
        warning = self._judge(values)
        for figure, value in values.items():
            history = self._history.setdefault(figure, [])
            history.append(value)
            del history[: -self.window]
        if warning is None or (self._warned is not None and step - self._warned <= self.pause):
            return None
        self._warned = step
        return warning

    def state_dict(self) -> dict[str, Any]:
        """The whole state, JSON-able."""
        return {"history": {k: list(v) for k, v in self._history.items()}, "warned": self._warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._history = {k: list(v) for k, v in state["history"].items()}
        self._warned = state["warned"]

    def _judge(self, values: Mapping[str, float]) -> MismatchWarning | None:
        for figure in FIGURES:
            value, usual = values.get(figure), self._usual(figure)
            if value is None:
                continue
            limit = max(FACTOR * usual, FLOORS[figure]) if usual is not None else math.inf
            if figure == "mismatch/mean_abs":
                limit = min(limit, FAULT)
            if value > limit:
                return MismatchWarning(figure, value, usual, limit, self._causes(figure, values))
        return None

    def _usual(self, figure: str) -> float | None:
        history = self._history.get(figure, [])
        return statistics.median(history) if len(history) >= ENOUGH else None

    def _causes(self, figure: str, values: Mapping[str, float]) -> list[str]:
        causes = []
        usual_growth = self._usual(GROWTH)
        if values.get(GROWTH, 1.0) > FACTOR * (usual_growth if usual_growth is not None else 1.0):
            causes.append(POSITION)
        history, usual = self._history.get(figure, []), self._usual(figure)
        if usual is None:
            return [*causes, TEMPERATURE, STALE]
        # The last steps before this one tell a jump from a slow rise.
        risen = statistics.fmean(history[-3:]) > 1.3 * usual
        return [*causes, PRECISION, STALE] if risen else [*causes, STALE, PRECISION]
