"""Reference resets carried out: the rules are asked after each step, said, and followed.

The decision is a pure state machine (`schedule.reference_reset`); which rules hold is the stage's
(`reset_rules`). What it took to decide is an event, whatever was decided.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from prorl_nemo.recipe import Recipe
from prorl_nemo.schedule.reference_reset import Decision, ReferenceReset
from prorl_nemo.training.reset_rules import ResetRules
from prorl_nemo.training.run_state import Checkpoints, DamagedCheckpoint
from prorl_nemo.training.saving import Saver


class ReferencePolicy(Protocol):
    """What a reset asks of the trainer's ranks."""

    def reset_reference(self, clear_optimizer: bool = False) -> None: ...

    def load_reference(self, folder: Path) -> None: ...


class Reference:
    """The reference of a run, and when it was reset.

    Args:
        checkpoints, saver: where the best validation's policy is.
        on_event: called with an event's name and details.

    Attributes:
        resets: the state machine.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: ReferencePolicy,
        checkpoints: Checkpoints,
        saver: Saver,
        on_event: Callable[..., None],
    ) -> None:
        self._policy, self._checkpoints, self._saver = policy, checkpoints, saver
        self._on_event = on_event
        self._rules = ResetRules(recipe)
        self.resets = ReferenceReset(self._rules.settings(0))

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and score of the best validation so far."""
        return self.resets.best

    def warmup(self, stage: int, step: int) -> float:
        """Factor of the learning rate in `step`, after the last reset."""
        return self._rules.warmup(stage, step, self.resets.last_reset)

    def after_step(
        self, step: int, stage: int, opening: int | None, row: dict[str, Any], score: float | None
    ) -> Decision:
        """Decide after a step, and reset the reference if that is the decision.

        Args:
            stage: of the step.
            opening: the stage that begins after it with a reset of its own, if any.
            row: the step's metrics.
            score: of the step's validation, if it had one.
        """
        rules = stage if opening is None else opening
        self.resets.settings = self._rules.settings(rules)
        self.resets.triggers = self._rules.triggers(rules)
        decision = self.resets.observe(
            step,
            kl=row.get("policy/kl"),
            validation=score,
            metrics=row,
            due=None if opening is None else "stage_start",
        )
        if not decision.reset:
            self._on_event("reset_decision", reset=False, figures=decision.figures)
            return decision
        source, why = self._reset(decision)
        self._on_event(
            "reference_reset",
            trigger=decision.trigger,
            source=source,
            optimizer=decision.optimizer,
            figures=decision.figures,
            **({"best_unusable": why} if why else {}),
        )
        return decision

    def _reset(self, decision: Decision) -> tuple[str, str | None]:
        """The reference from where the decision says, or from the policy if that cannot be read."""
        best = decision.figures["best_step"]
        self._policy.reset_reference(decision.optimizer == "clear")
        if decision.source == "current" or best is None:
            return "current", None
        self._saver.collect(wait=True)
        try:
            self._checkpoints.verify(int(best))
        except DamagedCheckpoint as reason:
            return "current", f"step {int(best)}: {reason}"
        self._policy.load_reference(self._checkpoints.path(int(best)) / "policy")
        return "best", None
