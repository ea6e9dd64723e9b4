"""What is known of a run that is watched: its place, its figures so far, and the time it needs."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from prorl_nemo.training.live_text import (
    Row,
    clock_of,
    describe_event,
    printable,
    show,
    stage_of,
)
from prorl_nemo.training.metrics import number

RECENT_STEPS = 20  # enough to smooth validations and checkpoints into the time left
EVENTS_SHOWN = 4


@dataclass
class Watched:
    """Filled from metrics rows and events; takes whatever they hold.

    Attributes:
        total: steps of the whole run.
        row: of the last step.
        rewards: of every step. validations: the rows, by step. events: the last few, in words.
        phase_done, phase_total: how far the phase is; no total: unknown.
    """

    name: str
    model: str
    total: int
    started: float = field(default_factory=time.monotonic)
    step: int = 0
    stage: str = ""
    row: Row = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)
    validations: dict[int, Row] = field(default_factory=dict)
    events: deque[str] = field(default_factory=lambda: deque(maxlen=EVENTS_SHOWN))
    phase: str = "starting"
    phase_started: float = field(default_factory=time.monotonic)
    phase_done: float = 0.0
    phase_total: float | None = None
    phase_detail: str = ""
    step_ends: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def forget(self) -> None:
        """All figures; events and the time the run was begun stay."""
        self.stage, self.row = "", {}
        self.rewards.clear()
        self.validations.clear()
        self.step_seconds.clear()

    def begin_phase(self, name: str, total: float | None) -> None:
        self.phase, self.phase_total = printable(name), number(total)
        self.phase_done, self.phase_detail = 0.0, ""
        self.phase_started = time.monotonic()

    def take_step(self, row: Row) -> None:
        self.row = row
        self.step = int(number(row.get("step")) or self.step + 1)
        self.stage = stage_of(row) or self.stage
        ended = number(row.get("time"))
        reward, seconds = number(row.get("reward/raw_mean")), number(row.get("time/step"))
        if ended is not None:
            self.step_ends.append((self.step, ended))
        if reward is not None:
            self.rewards.append(reward)
        if seconds is not None:
            self.step_seconds.append(seconds)

    def take_validation(self, row: Row) -> None:
        if number(row.get("validation/mean")) is not None:
            self.validations[int(number(row.get("step")) or 0)] = row

    def take_event(self, event: Row) -> str:
        """The event in words."""
        text = describe_event(event)
        self.events.append(f"{clock_of(event)}  step {show(event, 'step', 'd')}  {text}")
        if event.get("event") == "stage_started":
            self.stage = stage_of(event)
        return text

    def seconds_left(self) -> float | None:
        """Recent wall-clock time per step, validations included, times the steps to go."""
        if len(self.step_ends) > 1:
            (first, start), (last, end) = self.step_ends[0], self.step_ends[-1]
            per_step = (end - start) / max(last - first, 1)
        elif self.step_seconds:
            per_step = sum(self.step_seconds) / len(self.step_seconds)
        else:
            return None
        return max(per_step, 0.0) * max(self.total - self.step, 0)
