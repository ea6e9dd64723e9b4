"""`prorl train`: start a run, or go on where it stopped; end with its report.

A run outlives its processes: when a trainer rank or the engines are lost, all of them are started
anew from the last checkpoint, by the same code that resumes a run by hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prorl_nemo.cluster.placement import ClusterError, NodeLost
from prorl_nemo.cluster.policy_group import PolicyError
from prorl_nemo.errors import FaultError, UserError
from prorl_nemo.model_source import resolve_model
from prorl_nemo.recipe import Recipe
from prorl_nemo.reporting import write_report
from prorl_nemo.training.live_view import LiveView
from prorl_nemo.training.loop import Trainer
from prorl_nemo.training.metrics import METRICS, RunLog, read_rows
from prorl_nemo.training.preflight import check_resources
from prorl_nemo.training.reset_rules import ResetRules
from prorl_nemo.training.run_dir import open_run_dir
from prorl_nemo.training.run_state import Checkpoints
from prorl_nemo.training.saving import SaveFailed
from prorl_nemo.training.session import open_session
from prorl_nemo.training.stopping import OutOfTime, StopRequested, StopWatch, seconds_left
from prorl_nemo.training.tracking import CLOSE_SECONDS, Tracker, check_installed


class RestartNeeded(Exception):
    """The processes must be started anew, from the last checkpoint."""


FAULTS = (PolicyError, NodeLost, RestartNeeded)
"""What a new start of the processes mends. Not `FleetError`: each engine was started anew until
`rollout.max_engine_restarts`, and the run has been saved."""


def train(recipe: Recipe) -> tuple[bool, Path]:
    """Run a recipe to its end or until it is stopped.

    Returns:
        whether it is finished, and the path of the report.

    Raises:
        UserError: anything about recipe, model, machine or run directory that has to be changed;
            a run that stopped without its last checkpoint.
        FaultError: its processes keep dying, or too few nodes are left.
    """
    folder = resolve_model(recipe.model)
    check_resources(recipe, folder)
    check_installed(recipe)
    ResetRules(recipe)  # Triggers that cannot be imported are refused now.
    checkpoints = Checkpoints(
        recipe.run_dir / "checkpoints", recipe.checkpoint.keep_last, recipe.checkpoint.keep_every
    )
    left = seconds_left(recipe.faults.wall_clock_hours, os.environ)
    stop = StopWatch(recipe.faults.stop_seconds, left)
    view = LiveView(recipe.name, recipe.model, recipe.total_steps)
    with (
        open_run_dir(recipe) as changes,
        RunLog(recipe.run_dir) as log,
        view,
        stop.listening(),
    ):
        tracker = Tracker.of_recipe(recipe, recipe.run_dir)
        run = _Run(recipe, folder, checkpoints, log, view, stop.should_stop, tracker)
        try:
            finished = run.to_the_end(changes)
        except OutOfTime:
            log.event("stopped", run.step, reason=f"{stop.reason}, without saving: out of time")
            raise UserError(
                f"{stop.reason}: the last step could not be saved within faults.stop_seconds "
                f"({recipe.faults.stop_seconds:g}); the same command resumes from the checkpoint "
                "before"
            ) from None
        except SaveFailed as error:
            raise UserError(
                f"checkpoint: {error}; make room or mend the disk, then the same command resumes "
                "from the checkpoint before"
            ) from None
        finally:
            checkpoints.close()
            lost = tracker.close(stop.left(CLOSE_SECONDS))
            for name, rows in lost.items():
                if rows:
                    log.event("rows_lost", run.step, of=name, rows=rows)
    report = recipe.run_dir / "report.html"
    try:
        write_report([recipe.run_dir], report)
    except (OSError, UserError) as error:  # Also of a run that stopped before its first step.
        print(f"the report could not be written: {error}", file=sys.stderr)
    return finished, report


class _Run:
    """One run over as many starts of its processes as it takes."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        checkpoints: Checkpoints,
        log: RunLog,
        view: LiveView,
        should_stop: Callable[[float], str | None],
        tracker: Tracker,
    ) -> None:
        self.recipe, self.folder, self.checkpoints = recipe, folder, checkpoints
        self.log, self.view, self.tracker = log, view, tracker
        self.should_stop = should_stop
        self.trainer: Trainer | None = None

    @property
    def step(self) -> int:
        steps = self.checkpoints.steps()
        return self.trainer.step if self.trainer else (steps[-1] if steps else 0)

    def to_the_end(self, changes: dict[str, list[Any]]) -> bool:
        """Whether the run is finished; False if it was asked to stop."""
        restarts, reached = 0, -1
        while True:
            try:
                return self._once(changes if reached < 0 else {})
            except ClusterError as error:
                if reached < 0:
                    raise
                # A node was lost, and Ray has noticed before whoever watches the nodes.
                raise FaultError(f"{error}\n  That was enough when the run began") from error
            except FAULTS as fault:
                if reason := self.should_stop(0.0):
                    # Slurm ends all processes of a cancelled job at once; new ones would be too.
                    self._event("stopped", {"reason": f"{reason}, without saving: {fault}"})
                    raise UserError(
                        f"{reason}: {fault}, before the last step was saved; the same command "
                        "resumes from the last checkpoint"
                    ) from fault
                step = self.step
                restarts = 1 if step > reached else restarts + 1
                reached = max(reached, step)
                if self.trainer:
                    self.trainer.saver.collect(wait=True)
                if restarts > self.recipe.faults.max_restarts:
                    raise FaultError(
                        f"faults.max_restarts: {fault}; {restarts - 1} restarts have not brought "
                        f"the run past step {reached}. The same command resumes from the last "
                        "checkpoint"
                    ) from fault
                self.trainer = None
                self._event("restarted", {"reason": str(fault), "reached_step": step})

    def _once(self, changes: dict[str, list[Any]]) -> bool:
        try:
            self._start(changes)
        except StopRequested:
            return False
        return True

    def _start(self, changes: dict[str, list[Any]]) -> None:
        recipe = self.recipe
        if not self.checkpoints.steps():
            self.log.truncate_after(-1)  # Before anything of this start is said.
        with open_session(recipe, self.folder, self._event, self.view.phase) as session:
            trainer = Trainer(
                session, self.log, self.view, self.checkpoints, self.should_stop, self.tracker
            )
            self.trainer = trainer
            self.view.phase("resume")
            if not trainer.resume():
                trainer.event("run_started", recipe=recipe.fingerprint)
            self.view.history(read_rows(recipe.run_dir / METRICS), trainer.step)
            if changes:
                trainer.event("recipe_changed", changes=changes)
            trainer.run()

    def _event(self, event: str, details: dict[str, Any]) -> None:
        self.view.event(self.log.event(event, self.step, **details))
        if event != "engine_restarted":
            return
        if reason := self.should_stop(0.0):
            raise StopRequested(reason)  # Not to wait for an engine that nobody needs.
        if self.recipe.rollout.deterministic:
            # What the new engine computes is not what the old one would have computed together.
            raise RestartNeeded("rollout.deterministic: an engine was replaced")
