"""Saving a run while it trains: begin, take note of how it ended, know what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prorl_nemo.training.run_state import BeginSave, Checkpoints, SaveOutcome

FIRST_SAVE_SECONDS = 60.0
"""What a save is taken to cost before the first one is done."""


class SaveFailed(Exception):
    """The checkpoint on which a stop or an end relies could not be written."""


class Saver:
    """Writes checkpoints and tells the event log about each.

    Args:
        background: return once the tensors are copied.
        on_event: called with an event's name and details.

    Attributes:
        blocked_seconds: of training, by the last `save`.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        begin_policy: BeginSave,
        background: bool,
        on_event: Callable[..., None],
    ) -> None:
        self.checkpoints = checkpoints
        self._begin_policy, self._background = begin_policy, background
        self._on_event = on_event
        self._costs: list[float] = []
        self.blocked_seconds = 0.0

    def save(self, step: int, state: dict[str, Any], best: int | None, last: bool = False) -> None:
        """A checkpoint of a finished step, unless it has one.

        Args:
            best: the step whose checkpoint must be kept.
            last: the run ends after it: wait until it is there.

        Raises:
            SaveFailed: with `last`, and the checkpoint could not be written.
        """
        started = time.monotonic()
        if self.checkpoints.saving_step != step:
            self.collect(wait=True)
            if step in self.checkpoints.steps():
                return
            self.checkpoints.begin(step, state, self._begin_policy, best)
        outcome = None
        if last or not self._background:
            outcome = self.collect(wait=True)
        self.blocked_seconds = time.monotonic() - started
        if last and outcome is not None and outcome.error is not None:
            raise SaveFailed(f"{outcome.path} could not be written: {outcome.error}")

    def collect(self, wait: bool = False) -> SaveOutcome | None:
        """Log how a save ended, if one has (or when it has)."""
        outcome = self.checkpoints.wait() if wait else self.checkpoints.take_outcome()
        if outcome is None:
            return None
        if outcome.error is None:
            self._costs.append(outcome.seconds)
            details = {"path": str(outcome.path), "seconds": outcome.seconds}
            self._on_event("checkpoint_saved", saved_step=outcome.step, **details)
        else:
            self._on_event("checkpoint_failed", saved_step=outcome.step, reason=outcome.error)
        return outcome

    def recall(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Learn from the event log of an earlier start what saves have cost."""
        seconds = (e.get("seconds") for e in events if e.get("event") == "checkpoint_saved")
        self._costs = [float(s) for s in seconds if isinstance(s, int | float)][-10:]

    @property
    def expected_seconds(self) -> float:
        """Time to allow for a save: half as much again as the slowest of the last ten."""
        return 1.5 * max(self._costs[-10:], default=FIRST_SAVE_SECONDS)
