"""When a run has to end before its last step: a signal, or the end of its time.

Slurm sends SIGTERM (or SIGUSR1, with --signal) some time before it kills. The run then saves its
last finished step. If that cannot be done in time it ends without, at the checkpoint before, and
says so: a process that is killed says nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

ENDING_SECONDS = 30.0
"""What is left of the wall-clock time after a save: for processes, tracking and the report."""

LAST_MOMENTS = 0.1
"""Share of the time to stop in that is left for ending the processes."""


class StopRequested(Exception):
    """The user, the scheduler or the clock wants the run to save and end."""


class OutOfTime(BaseException):
    """The time to stop in is over. Not an Exception: nothing on the way may take it for a fault."""


class StopWatch:
    """Reasons to stop. A second Ctrl-C ends the run at once, without saving.

    Args:
        stop_seconds: after SIGTERM or SIGUSR1 `OutOfTime` is raised shortly before this time is
            over, and the process ends when it is. Ctrl-C has no such limit: somebody is waiting.
        seconds_left: of the run's wall-clock time; None: no limit.
    """

    def __init__(self, stop_seconds: float, seconds_left: float | None = None) -> None:
        self.stop_seconds = stop_seconds
        self.reason: str | None = None
        # Of the monotonic clock: that of the wall may be set while the run goes on.
        self._deadline = None if seconds_left is None else time.monotonic() + seconds_left
        self._ends: float | None = None
        self._last_resort: threading.Timer | None = None

    def should_stop(self, save_seconds: float) -> str | None:
        """A reason to stop now, given how long saving takes; or None."""
        if self.reason is None and self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left < save_seconds + ENDING_SECONDS:
                self.reason = f"wall clock: {max(0.0, left):.0f} s left, a save takes as long"
        return self.reason

    def left(self, most: float) -> float:
        """Seconds for what may still be done before the run ends: `most`, or less after a signal
        that sets a time."""
        if self._ends is None:
            return most
        return max(0.0, min(most, self._ends - time.monotonic()))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT, SIGTERM and SIGUSR1 as requests. Only in the main thread."""
        caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._take) for number in caught}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._alarm)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if self._last_resort:
                self._last_resort.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.reason:
                raise KeyboardInterrupt
        elif not self.reason:
            last = LAST_MOMENTS * self.stop_seconds
            self._ends = time.monotonic() + self.stop_seconds - 2 * last
            signal.setitimer(signal.ITIMER_REAL, self.stop_seconds - last)
            # A thread: the main one takes no signal while Ray waits for a process that is hung.
            self._last_resort = threading.Timer(self.stop_seconds, self._end)
            self._last_resort.daemon = True
            self._last_resort.start()
        self.reason = self.reason or signal.Signals(number).name

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        raise OutOfTime(self.reason)

    def _end(self) -> None:
        print(f"ended {self.stop_seconds:.0f} s after {self.reason}", file=sys.stderr, flush=True)
        os._exit(3)


def seconds_left(hours: float | None, environment: Mapping[str, str]) -> float | None:
    """Of the run's wall-clock time: the recipe's hours, or to the end of the Slurm job."""
    if hours is not None:
        return hours * 3600
    end = environment.get("SLURM_JOB_END_TIME", "")
    return float(end) - time.time() if end.isdigit() else None
