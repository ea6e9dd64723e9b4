"""`prorl train`: start a run, or go on where it stopped; end with its report."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from prorl_nemo.model_source import resolve_model
from prorl_nemo.recipe import Recipe
from prorl_nemo.reporting import write_report
from prorl_nemo.training.live_view import LiveView
from prorl_nemo.training.loop import StopRequested, Trainer
from prorl_nemo.training.metrics import METRICS, RunLog, read_rows
from prorl_nemo.training.preflight import check_resources
from prorl_nemo.training.run_dir import open_run_dir
from prorl_nemo.training.run_state import Checkpoints
from prorl_nemo.training.session import open_session


def train(recipe: Recipe) -> tuple[bool, Path]:
    """Run a recipe to its end or until it is stopped.

    Returns:
        whether it is finished, and the path of the report.

    Raises:
        UserError: anything about recipe, model, machine or run directory that has to be changed.
    """
    folder = resolve_model(recipe.model)
    check_resources(recipe, folder)
    checkpoints = Checkpoints(recipe.run_dir / "checkpoints", recipe.checkpoint.keep_last)
    stop = _StopSignal()
    finished = True
    view = LiveView(recipe.name, recipe.model, recipe.total_steps)
    with (
        open_run_dir(recipe) as changes,
        RunLog(recipe.run_dir) as log,
        view,
        stop.listening(),
    ):
        steps = checkpoints.steps()

        def on_event(event: str, details: dict[str, object]) -> None:
            step = trainer.step if trainer else (steps[-1] if steps else 0)
            view.event(log.event(event, step, **details))

        trainer: Trainer | None = None
        with open_session(recipe, folder, on_event, view.phase) as session:
            trainer = Trainer(session, log, view, checkpoints, lambda: stop.reason)
            if steps:
                view.phase("resume")
                trainer.resume(steps[-1])
                view.history(read_rows(recipe.run_dir / METRICS))
            else:
                log.truncate_after(-1)
                trainer.event("run_started", recipe=recipe.fingerprint)
            if changes:
                trainer.event("recipe_changed", changes=changes)
            try:
                trainer.run()
            except StopRequested:
                finished = False
    report = recipe.run_dir / "report.html"
    write_report([recipe.run_dir], report)
    return finished, report


class _StopSignal:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 into a request; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._take) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
