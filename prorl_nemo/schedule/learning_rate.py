"""Learning rate of a rollout step: warm-up, then one of the usual schedules, down to a floor.

ProRL trains at a constant 2e-6. The unit is the rollout step, not the optimizer update, so
that changing the number of minibatches does not change the schedule. Our choice.
"""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"]


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    schedule: Schedule = "constant",
    warmup_steps: int = 0,
    decay_steps: int = 0,
    floor: float = 0.0,
) -> float:
    """Rate of all optimizer updates in `step` (from 1).

    Warm-up is linear: step k of w has peak * k / w, so no step is spent at rate 0. Of n decay
    steps, step k has gone (k - 1) / n of the way from peak to floor: the first has the peak,
    the last is one step short of the floor, which may be 0. `linear` and `cosine` decay from the
    end of the warm-up, `wsd` (warm-up, stable, decay; arXiv 2404.06395) linearly over the last
    `decay_steps`. `inverse_sqrt` has peak * sqrt(w / step) after the warm-up (Vaswani et al.,
    arXiv 1706.03762; without warm-up w is 1), never below the floor.

    Raises:
        ValueError: step outside 1 .. total_steps, a floor above the peak of a decaying
            schedule, or an unknown schedule.
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"step {step} is outside 1 .. {total_steps}")
    if schedule != "constant" and not 0.0 <= floor <= peak:
        raise ValueError(f"learning rate: the floor {floor} must lie between 0 and peak {peak}")
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "inverse_sqrt":
        return max(floor, peak * math.sqrt(max(warmup_steps, 1) / step))
    start = max(warmup_steps, total_steps - decay_steps) if schedule == "wsd" else warmup_steps
    if step <= start:
        return peak
    progress = (step - 1 - start) / (total_steps - start)
    if schedule in ("linear", "wsd"):
        return peak + (floor - peak) * progress
    if schedule == "cosine":
        return floor + 0.5 * (peak - floor) * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown learning rate schedule {schedule!r}")
