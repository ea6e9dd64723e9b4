"""The training loop of ProRL v2: one rollout step after another, for as long as the recipe says.

The order inside a step is that of docs/algorithm.md: sample until the batch is full of groups
with signal, shape, normalise, recompute old and reference log-probs, update in minibatches,
send the weights to the engines, validate, decide on a reference reset, save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

from prorl_nemo.recipe import Recipe
from prorl_nemo.rollout.dynamic_sampler import DynamicSampler, RolloutBatch
from prorl_nemo.rollout.filling import Progress
from prorl_nemo.rollout.fleet import FleetError
from prorl_nemo.rollout.group_collector import Sampling
from prorl_nemo.rollout.prompt_history import PromptHistory
from prorl_nemo.schedule.collapse import CollapseWatch
from prorl_nemo.schedule.mismatch_watch import MismatchWatch
from prorl_nemo.schedule.stages import StageSettings
from prorl_nemo.training import resuming, step_metrics
from prorl_nemo.training.batch import StepSettings, TrainingBatch
from prorl_nemo.training.live_view import LiveView
from prorl_nemo.training.metrics import RunLog
from prorl_nemo.training.reference import Reference
from prorl_nemo.training.rollout_batch import advantages_of, training_batch
from prorl_nemo.training.run_state import Checkpoints
from prorl_nemo.training.saving import Saver
from prorl_nemo.training.session import Session
from prorl_nemo.training.skipped_updates import SkippedUpdates
from prorl_nemo.training.stage_rules import StageRules
from prorl_nemo.training.stopping import StopRequested
from prorl_nemo.training.tracking import Tracker
from prorl_nemo.training.validation import validation_row

UPDATE_PHASES = ("logprobs", "reference", "train", "sync", "validate")


class Learned(NamedTuple):
    """What a step's updates leave behind: its settings, what was sampled, its metrics row."""

    stage: StageSettings
    rollout: RolloutBatch
    batch: TrainingBatch
    row: dict[str, Any]


class Trainer:
    """A run from its current step on.

    Args:
        session: the running parts.
        log, view: where figures and events go.
        should_stop: asked often, with the seconds a save needs; a reason to stop, or None.
        tracker: of the recipe's tracking back ends.
    """

    def __init__(
        self,
        session: Session,
        log: RunLog,
        view: LiveView,
        checkpoints: Checkpoints,
        should_stop: Callable[[float], str | None],
        tracker: Tracker | None = None,
    ) -> None:
        self.session, self.log, self.view = session, log, view
        self.recipe: Recipe = session.recipe
        self.checkpoints = checkpoints
        self.saver = Saver(
            checkpoints, session.policy.begin_save, self.recipe.checkpoint.background, self.event
        )
        self.should_stop = should_stop
        self.tracker = tracker or Tracker([])
        self.step = 0
        self.updated_step = 0  # The last with updates: the version of the weights.
        self.validated_step = -1
        self.last_validation: dict[str, float] | None = None
        self.rules = StageRules(self.recipe)
        self.stages = self.rules.stages
        self.reference = Reference(self.recipe, session.policy, checkpoints, self.saver, self.event)
        self.collapse = CollapseWatch()
        self.mismatch = MismatchWatch()
        self.sampler = DynamicSampler(
            session.fleet,
            session.graders,
            session.prompts.stream,
            self.recipe.seed,
            carry_over=self.recipe.rollout.surplus == "carry_over",
            history=self._history(),
            replace=self.recipe.rollout.dynamic_sampling,
            lockstep=self.recipe.rollout.deterministic,
            on_event=lambda event, details: self.event(event, **details),
            on_progress=self._progress,
        )
        self.times: dict[str, float] = {}
        self.update_seconds = 0.0
        self.skipped = SkippedUpdates(
            self.recipe.run_dir / "skipped", self.recipe.policy.optimizer.max_skipped_updates
        )
        self.updating = False
        self._lost_rows_said = log.lost_rows
        self.ending: StopRequested | FleetError | None = None

    # ---- the run --------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step. On StopRequested the last finished step is saved first.

        Raises:
            StopRequested: stopped and saved.
            FleetError: engines fail again and again, or with wrong weights; saved.
            SaveFailed: the last checkpoint could not be written.
        """
        self.view.plan(self.stages.total_steps)  # Resumed, stages may have ended early.
        try:
            if self.step == 0 and self.recipe.validation.at_start and self.validated_step < 0:
                self.validate()
                self.reference.resets.observe(0, validation=self._validation_mean())
            while self.step < self.stages.total_steps:
                self._check_stop(self.update_seconds)
                self.train_step()
            if self.validated_step < self.step:
                self.validate()  # Resumed after a last step that ended without engines.
        except (StopRequested, FleetError) as stop:
            self.save(last=True)
            self.event("stopped", reason=str(stop))
            raise
        self.save(last=True)
        self.event("finished")

    def train_step(self) -> None:
        """One rollout, its updates, and everything that follows from them."""
        step, started = self.step + 1, time.monotonic()
        self.saver.collect()
        # The row is written before the save, or a run killed between the two would lose it; so
        # a step's row carries the time of the save before it.
        self.times = {"checkpoint": self.saver.blocked_seconds}
        self.saver.blocked_seconds = 0.0
        self._announce(step)
        learned = self._learn(step, self.stages.at(step))
        self.step = step
        new_best = self._account(learned, started)
        self.updating = False
        self.update_seconds = sum(self.times.get(phase, 0.0) for phase in UPDATE_PHASES)
        if self.ending:
            raise self.ending
        due = step % self.recipe.checkpoint.interval == 0
        keep = new_best and self.recipe.checkpoint.keep_best
        if due or keep or step == self.stages.total_steps:
            self.save()

    def _learn(self, step: int, stage: StageSettings) -> Learned:
        """The algorithm: sample, shape and normalise, update, give the engines the weights."""
        cosine = self.rules.cosine(step)
        with self._phase("generate", self.recipe.rollout.prompts_per_step):
            self._forget_prefixes()
            rollout = self.sampler.sample_batch(
                self.recipe.rollout.prompts_per_step,
                Sampling(stage.samples_per_prompt, stage.temperature, stage.max_response_tokens),
                self.recipe.rollout.max_rejected_per_kept,
            )
        outcome = advantages_of(rollout.groups, self.recipe, stage, cosine)
        batch = training_batch(rollout.groups, outcome, stage.temperature, self.session.version)
        settings = StepSettings(
            learning_rate=self._learning_rate(step),
            clip_low=stage.clip_low,
            clip_high=stage.clip_high,
            minibatches=self.recipe.algorithm.minibatches,
        )
        self.log.samples(step, step_metrics.sample_rows(step, rollout, outcome))
        self.updating = True
        records = self._update(batch, settings) if batch.groups else []
        row = step_metrics.train_row(self.recipe, step, stage, rollout, outcome, batch, records)
        row |= {
            "policy/learning_rate": settings.learning_rate,
            "shaping/cosine_on": int(cosine is not None),
        }
        return Learned(stage, rollout, batch, row)

    def _account(self, learned: Learned, started: float) -> bool:
        """Validate, decide on a reset, write the step's row, warn. Whether it is a new best."""
        step, stage, rollout, batch, row = self.step, *learned
        for source, share in self.session.prompts.stream.drawn_shares.items():
            row[f"rollout/drawn/{source}"] = share
        due = step % self.recipe.validation.interval == 0 or step == self.stages.total_steps
        validated = due and self._with_engines(self.validate)
        if validated:
            self._end_stalled_stage()
        decision = self.reference.after_step(
            step,
            stage.index,
            self.rules.opening_reset(step),
            row,
            self._validation_mean() if validated else None,
        )
        self.times["step"] = time.monotonic() - started
        row |= step_metrics.time_figures(self.times, rollout, batch)
        row |= self.session.hardware_figures(batch, self.times.get("train", 0.0))
        self._write(row)
        self._say_lost_rows()
        for warning in self.collapse.observe(step, row):
            self.event("collapse_warning", **asdict(warning))
        if mismatch := self.mismatch.observe(step, row):
            self.event("mismatch_warning", **asdict(mismatch))
        return decision.new_best

    def _update(self, batch: TrainingBatch, settings: StepSettings) -> list[dict[str, float]]:
        policy = self.session.policy
        if self.recipe.rollout.sleep_in_updates:
            self._with_engines(self.session.fleet.sleep)  # The new weights wake them.
        with self._phase("logprobs"):
            batch.old_logprobs, _ = policy.logprobs(batch)
        with self._phase("reference"):
            batch.reference_logprobs, _ = policy.logprobs(batch, "reference")
        with self._phase("train"):
            records = policy.train(batch, settings)
        self.updated_step = self.step + 1
        self.skipped.count(self.step + 1, batch, settings.minibatches, records)
        with self._phase("sync"):
            self._with_engines(self._sync_weights)
        return records

    def _sync_weights(self) -> None:
        self.session.sync_weights(self.updated_step)
        every = self.recipe.rollout.verify_weights_every
        if every and (self.step + 1) % every == 0:
            started = time.monotonic()
            tensors = self.session.verify_weights()
            self.event("weights_verified", tensors=tensors, seconds=time.monotonic() - started)

    def _with_engines(self, work: Callable[[], None]) -> bool:
        """Work for the engines once a batch is drawn. If they fail for good, or one is replaced
        in a run that is to stop, the run ends with the step finished: batch and updates cannot be
        taken back. Whether the work was done."""
        if self.ending is None:
            try:
                work()
                return True
            except (StopRequested, FleetError) as reason:
                self.ending = reason
        return False

    def validate(self) -> None:
        """Mean score on the held-out prompts; the same prompts and seeds every time."""
        validation = self.recipe.validation
        stage = self.stages.at(max(1, self.step))
        prompts = [(prompt, 0) for prompt in self.session.prompts.validation]
        with self._phase("validate", len(prompts)):
            self._forget_prefixes()
            groups = self.sampler.sample_all(
                prompts,
                Sampling(
                    validation.samples,
                    validation.temperature,
                    stage.max_response_tokens,
                    validation.top_p,
                ),
            )
        row = validation_row(groups, self.session.prompts.never_trained)
        row |= {"step": self.step, "time/validate": self.times["validate"]}
        best = self.reference.best
        row["validation/best"] = max(row["validation/mean"], best[1] if best else -1.0)
        self.last_validation, self.validated_step = row, self.step
        self._write(row)

    def _end_stalled_stage(self) -> None:
        mean = self._validation_mean()
        stage = self.stages.at(self.step)
        if mean is not None and self.stages.observe(self.step, mean):
            self.event("stage_ended", stage=stage.index, planned_last_step=stage.last_step)
            self.view.plan(self.stages.total_steps)

    # ---- state ----------------------------------------------------------------------------

    def save(self, last: bool = False) -> None:
        """A checkpoint of the last finished step, unless it has one."""
        self.view.phase("checkpoint", None)
        best = self.reference.best if self.recipe.checkpoint.keep_best else None
        self.saver.save(self.step, resuming.state_of(self), best[0] if best else None, last)

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint; False without one. See `resuming.resume`."""
        return resuming.resume(self)

    @property
    def parts(self) -> dict[str, resuming.Stateful]:
        """Whatever decides the steps to come and is no tensor, by its name in state.json."""
        return {
            "stages": self.stages,
            "resets": self.reference.resets,
            "collapse": self.collapse,
            "mismatch": self.mismatch,
            "prompts": self.session.prompts.stream,
            "sampler": self.sampler,
        }

    # ---- small things ---------------------------------------------------------------------

    def event(self, event: str, **details: Any) -> None:
        self.view.event(self.log.event(event, self.step, **details))

    def _write(self, row: dict[str, Any]) -> None:
        written = self.log.metrics(row)
        self.tracker.log(written)
        (self.view.step if row["kind"] == "train" else self.view.validation)(written)

    def _say_lost_rows(self) -> None:
        """An event for rows that a full disk has cost, once one can be written again."""
        lost, before = self.log.lost_rows, self._lost_rows_said
        if lost > before:
            self.event("rows_lost", of="diary", rows=lost - before)
            if self.log.lost_rows == lost:
                self._lost_rows_said = lost

    def _history(self) -> PromptHistory | None:
        settings, stream = self.recipe.rollout.prompt_history, self.session.prompts.stream
        if settings is None:
            return None
        return PromptHistory(stream, self.recipe.seed, settings.in_a_row, settings.draw_share)

    def _forget_prefixes(self) -> None:
        """In deterministic mode a batch must not depend on what was computed before it."""
        if self.recipe.rollout.deterministic:
            self.session.fleet.reset_prefix_cache()

    def _announce(self, step: int) -> None:
        """What begins with a step: its stage, its data mix, the length penalty or its end."""
        if step == self.stages.at(step).first_step:
            self.collapse.new_stage()
        self.rules.mix(self.session.prompts.stream, step)
        self.rules.announce(
            step, lambda event, **more: self.view.event(self.log.event(event, step, **more))
        )

    def _learning_rate(self, step: int) -> float:
        warmup = self.reference.warmup(self.stages.at(step).index, step)
        return self.rules.learning_rate(step) * warmup

    def _validation_mean(self) -> float | None:
        return self.last_validation["validation/mean"] if self.last_validation else None

    def _progress(self, progress: Progress) -> None:
        rejected = f"{progress.rejected} rejected, " if progress.rejected else ""
        self.view.progress(
            progress.kept + progress.certain, f"{rejected}{progress.samples_running} running"
        )
        # A step whose updates are done must be finished, or its figures would be lost.
        if not self.updating:
            self._check_stop(self.update_seconds)

    def _check_stop(self, more_seconds: float) -> None:
        """Stop if asked to, or if saving would be too late after `more_seconds` of work."""
        reason = self.should_stop(self.saver.expected_seconds + more_seconds)
        if reason:
            raise StopRequested(reason)

    @contextmanager
    def _phase(self, name: str, total: float | None = None) -> Iterator[None]:
        self.view.phase(name, total)
        started = time.monotonic()
        yield
        self.times[name] = self.times.get(name, 0.0) + time.monotonic() - started
