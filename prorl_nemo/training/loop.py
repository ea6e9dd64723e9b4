"""The training loop of ProRL v2: one rollout step after another, for as long as the recipe says.

The order inside a step is that of docs/algorithm.md: sample until the batch is full of groups
with signal, shape, normalise, recompute old and reference log-probs, update in minibatches,
send the weights to the engines, validate, decide on a reference reset, save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prorl_nemo.errors import UserError
from prorl_nemo.recipe import Recipe
from prorl_nemo.rollout.dynamic_sampler import DynamicSampler, Progress
from prorl_nemo.rollout.group_collector import Sampling
from prorl_nemo.schedule.learning_rate import learning_rate
from prorl_nemo.schedule.reference_reset import ReferenceReset, ResetSettings
from prorl_nemo.schedule.stages import SETTINGS, Stages, StageSettings, penalty_on
from prorl_nemo.training import step_metrics
from prorl_nemo.training.batch import StepSettings, TrainingBatch
from prorl_nemo.training.live_view import LiveView
from prorl_nemo.training.metrics import RunLog
from prorl_nemo.training.rollout_batch import advantages_of, training_batch
from prorl_nemo.training.run_state import Checkpoints
from prorl_nemo.training.session import Session
from prorl_nemo.training.validation import validation_row


class StopRequested(Exception):
    """The user, the scheduler or the clock wants the run to save and end."""


class Trainer:
    """A run from its current step on.

    Args:
        session: the running parts.
        log, view: where figures and events go.
        should_stop: asked often; a reason to stop, or None.
    """

    def __init__(
        self,
        session: Session,
        log: RunLog,
        view: LiveView,
        checkpoints: Checkpoints,
        should_stop: Callable[[], str | None],
    ) -> None:
        self.session, self.log, self.view = session, log, view
        self.recipe: Recipe = session.recipe
        self.checkpoints = checkpoints
        self.should_stop = should_stop
        self.step = 0
        self.validated_step = -1
        self.last_validation: dict[str, float] | None = None
        self.stages = recipe_stages(self.recipe)
        reset = self.recipe.reference_reset
        self.resets = ReferenceReset(ResetSettings(**reset.model_dump()))
        self.sampler = DynamicSampler(
            session.fleet,
            session.graders,
            session.prompts.stream,
            self.recipe.seed,
            on_event=lambda event, details: self.event(event, **details),
            on_progress=self._progress,
        )
        self.times: dict[str, float] = {}
        self.skipped_in_a_row = 0
        self.updating = False

    # ---- the run --------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step. On StopRequested the last finished step is saved first."""
        try:
            if self.step == 0 and self.recipe.validation.at_start and self.validated_step < 0:
                self.validate()
                self.resets.observe(0, validation=self._validation_mean())
            while self.step < self.stages.total_steps:
                self._check_stop()
                self.train_step()
        except StopRequested as stop:
            self.save()
            self.event("stopped", reason=str(stop))
            raise
        if self.step not in self.checkpoints.steps():
            self.save()
        self.event("finished")

    def train_step(self) -> None:
        """One rollout, its updates, and everything that follows from them."""
        step, started = self.step + 1, time.monotonic()
        # The row is written before the save, or a run killed between the two would lose it; so
        # a step's row carries the time of the save before it.
        self.times = {"checkpoint": self.times.get("checkpoint", 0.0)}
        stage = self.stages.at(step)
        self._announce(step, stage)
        cosine_on = self._cosine_on(step)

        with self._phase("generate", self.recipe.rollout.prompts_per_step):
            rollout = self.sampler.sample_batch(
                self.recipe.rollout.prompts_per_step,
                Sampling(stage.samples_per_prompt, stage.temperature, stage.max_response_tokens),
                self.recipe.rollout.max_rejected_per_kept,
            )
        outcome = advantages_of(rollout.groups, self.recipe, stage, cosine_on)
        batch = training_batch(rollout.groups, outcome, stage.temperature)
        settings = StepSettings(
            learning_rate=self._learning_rate(step, stage),
            clip_low=stage.clip_low,
            clip_high=stage.clip_high,
            minibatches=self.recipe.algorithm.minibatches,
        )
        self.log.samples(step, step_metrics.sample_rows(step, rollout, outcome))
        self.updating = True
        records = self._update(batch, settings) if batch.groups else []
        self.step = step

        row = step_metrics.train_row(self.recipe, step, stage, rollout, outcome, batch, records)
        row |= {"policy/learning_rate": settings.learning_rate, "shaping/cosine_on": int(cosine_on)}
        validated = step % self.recipe.validation.interval == 0 or step == self.stages.total_steps
        if validated:
            self.validate()
        self._decide_reset(row, validated)
        self.times["step"] = time.monotonic() - started
        row |= step_metrics.time_figures(self.times, rollout, batch)
        self.view.step(self.log.metrics(row))
        self.updating = False
        self.times.pop("checkpoint")
        if step % self.recipe.checkpoint.interval == 0 or step == self.stages.total_steps:
            self.save()

    def _update(self, batch: TrainingBatch, settings: StepSettings) -> list[dict[str, float]]:
        policy = self.session.policy
        with self._phase("logprobs"):
            batch.old_logprobs, _ = policy.logprobs(batch)
        with self._phase("reference"):
            batch.reference_logprobs, _ = policy.logprobs(batch, "reference")
        with self._phase("train"):
            records = policy.train(batch, settings)
        self._count_skipped(records)
        with self._phase("sync"):
            self.session.sync_weights(self.step + 1)
        return records

    def _count_skipped(self, records: list[dict[str, float]]) -> None:
        """Stop a run whose updates are all skipped; the rollout can be read in samples/."""
        limit = self.recipe.policy.optimizer.max_skipped_updates
        for record in records:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if record["skipped"] else 0
            if self.skipped_in_a_row >= limit:
                raise UserError(
                    f"policy.optimizer.max_skipped_updates: {limit} updates in a row had NaN or "
                    f"infinite gradients, the last in step {self.step + 1}; lower the learning "
                    "rate or use fp32, and resume from the last checkpoint"
                )

    def validate(self) -> None:
        """Mean score on the held-out prompts; the same prompts and seeds every time."""
        validation = self.recipe.validation
        stage = self.stages.at(max(1, self.step))
        prompts = [(prompt, 0) for prompt in self.session.prompts.validation]
        with self._phase("validate", len(prompts)):
            groups = self.sampler.sample_all(
                prompts,
                Sampling(
                    validation.samples,
                    validation.temperature,
                    stage.max_response_tokens,
                    validation.top_p,
                ),
            )
        row = validation_row(groups) | {"step": self.step, "time/validate": self.times["validate"]}
        self.last_validation, self.validated_step = row, self.step
        self.view.validation(self.log.metrics(row))

    def _decide_reset(self, row: dict[str, Any], validated: bool) -> None:
        decision = self.resets.observe(
            self.step,
            kl=row.get("policy/kl"),
            validation=self._validation_mean() if validated else None,
            metrics=row,
        )
        if decision.reset:
            clear = decision.optimizer == "clear"
            self.session.policy.reset_reference(clear)
            self.event(
                "reference_reset",
                trigger=decision.trigger,
                optimizer=decision.optimizer,
                figures=decision.figures,
            )
        else:
            self.log.event("reset_decision", self.step, reset=False, figures=decision.figures)

    # ---- state ----------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of the last finished step, unless it has one."""
        if self.step in self.checkpoints.steps():
            return
        with self._phase("checkpoint"):
            path = self.checkpoints.save(self.step, self.state_dict(), self.session.policy.save)
        self.event("checkpoint_saved", path=str(path), seconds=self.times["checkpoint"])

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "validated_step": self.validated_step,
            "last_validation": self.last_validation,
            "resets": self.resets.state_dict(),
            "prompts": self.session.prompts.stream.state_dict(),
        }

    def resume(self, step: int) -> None:
        """Go on from a checkpoint: trainer, reference, cursor, schedules; engines get the weights.

        Rows and samples logged after that step are cut: those steps are done again.
        """
        state = self.checkpoints.read_state(step)
        self.session.policy.load(self.checkpoints.path(step) / "policy")
        self.step, self.validated_step = state["step"], state["validated_step"]
        self.last_validation = state["last_validation"]
        self.resets.load_state_dict(state["resets"])
        self.session.prompts.stream.load_state_dict(state["prompts"])
        self.log.truncate_after(step)
        self.session.sync_weights(step)
        self.event("resumed", checkpoint=str(self.checkpoints.path(step)))

    # ---- small things ---------------------------------------------------------------------

    def event(self, event: str, **details: Any) -> None:
        self.view.event(self.log.event(event, self.step, **details))

    def _announce(self, step: int, stage: StageSettings) -> None:
        """Events at the first step of a stage and at each switch of the length penalty."""
        if step == stage.first_step:
            before = self.stages.stages[stage.index - 1] if stage.index else None
            changes = stage.changes_from(before) if before else {}
            row = {"stage": stage.index, "stage_name": stage.name, "changes": changes}
            self.view.event(self.log.event("stage_started", step, **row))
        on = self._cosine_on(step)
        if self.recipe.shaping.cosine and (step == 1 or on != self._cosine_on(step - 1)):
            self.view.event(self.log.event("cosine_penalty", step, on=on))

    def _cosine_on(self, step: int) -> bool:
        cosine = self.recipe.shaping.cosine
        return cosine is not None and penalty_on(
            step, cosine.on_steps, cosine.off_steps, cosine.start_with
        )

    def _learning_rate(self, step: int, stage: StageSettings) -> float:
        optimizer = self.recipe.policy.optimizer
        return learning_rate(
            step,
            peak=stage.learning_rate,
            total_steps=self.stages.total_steps,
            schedule=optimizer.schedule,
            warmup_steps=optimizer.warmup_steps,
            decay_steps=optimizer.decay_steps,
            floor=optimizer.min_learning_rate,
        )

    def _validation_mean(self) -> float | None:
        return self.last_validation["validation/mean"] if self.last_validation else None

    def _progress(self, progress: Progress) -> None:
        rejected = f"{progress.rejected} rejected, " if progress.rejected else ""
        self.view.progress(
            progress.kept + progress.certain, f"{rejected}{progress.samples_running} running"
        )
        # A step whose updates are done must be finished, or its figures would be lost.
        if not self.updating:
            self._check_stop()

    def _check_stop(self) -> None:
        reason = self.should_stop()
        if reason:
            raise StopRequested(reason)

    @contextmanager
    def _phase(self, name: str, total: float | None = None) -> Iterator[None]:
        self.view.phase(name, total)
        started = time.monotonic()
        yield
        self.times[name] = self.times.get(name, 0.0) + time.monotonic() - started


def recipe_stages(recipe: Recipe) -> Stages:
    """The recipe's stages with what they leave out filled in."""
    everywhere = {
        "max_response_tokens": recipe.rollout.max_response_tokens,
        "samples_per_prompt": recipe.rollout.samples_per_prompt,
        "learning_rate": recipe.policy.optimizer.learning_rate,
        "temperature": recipe.rollout.temperature,
        "clip_low": recipe.algorithm.clip_low,
        "clip_high": recipe.algorithm.clip_high,
    }
    assert set(everywhere) == set(SETTINGS)
    return Stages([stage.model_dump() for stage in recipe.stages], everywhere)
