"""When the KL reference is replaced by the policy: ProRL's reference reset, as a state machine.

ProRL (arXiv 2505.24864, section 3.3) resets reference and optimizer when validation stalls;
ProRL v2 resets the reference every 200 to 500 steps, on KL spikes or stalled validation, and
keeps the optimizer. Thresholds are unpublished: those here are our choice.

The machine only decides. It sees each step's KL and each validation score, and its whole
state is JSON, so a resumed run decides as an uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Protocol

Source = Literal["current", "best"]
Optimizer = Literal["keep", "clear"]
Figures = dict[str, float | None]


@dataclass(frozen=True)
class ResetSettings:
    """When to reset and to what. A trigger set to None is off.

    Attributes:
        interval: steps from one reset, whatever its trigger, to the next scheduled one.
        kl_factor: a step's KL is a spike when above this many times the median of the
            `kl_window` steps before it, all since the last reset. Linear growth from 0
            reaches twice its median, quadratic growth four times: 3 tells drift from
            acceleration.
        kl_floor: nats per token below which nothing is a spike; the ratio of two rounding
            errors means nothing.
        kl_patience: spikes in a row that make a trigger; one odd batch is none.
        stalled_evaluations: validations in a row without a new best, since the last reset.
        cooldown: steps after a reset in which only the interval may trigger another.
        source: new reference weights. `best` takes the best checkpoint, but only while the
            latest validation is more than `best_margin` below it, else the current policy.
        best_margin: on the scale of the validation score (0.01 is one point).
        optimizer: keep the Adam moments (v2) or clear them (v1).
    """

    interval: int | None = 300
    kl_factor: float | None = 3.0
    kl_window: int = 100
    kl_floor: float = 1e-3
    kl_patience: int = 3
    stalled_evaluations: int | None = 5
    cooldown: int = 50
    source: Source = "current"
    best_margin: float = 0.01
    optimizer: Optimizer = "keep"

    def __post_init__(self) -> None:
        counts = (self.interval, self.kl_window, self.kl_patience, self.stalled_evaluations)
        if any(count is not None and count < 1 for count in counts):
            raise ValueError("reference reset: interval, window, patience and evaluations are >= 1")
        if self.kl_factor is not None and not self.kl_factor > 1.0:
            raise ValueError("reference reset: kl_factor must be above 1")
        if min(self.kl_floor, self.cooldown, self.best_margin) < 0:
            raise ValueError("reference reset: kl_floor, cooldown and best_margin are >= 0")
        if self.source not in ("current", "best") or self.optimizer not in ("keep", "clear"):
            raise ValueError("reference reset: source is current or best, optimizer keep or clear")


class Trigger(Protocol):
    """A trigger of one's own, asked after the built-in ones. It obeys the cool-down.

    It must be a function of its arguments alone: the machine saves no state for it.
    """

    @property
    def name(self) -> str:
        """What a reset that it causes is called in the event log."""
        ...

    def fires(self, figures: Mapping[str, float | None], metrics: Mapping[str, float]) -> bool:
        """`figures` as in `Decision`; `metrics` as given to `observe`."""
        ...


@dataclass(frozen=True)
class Decision:
    """What to do after a step, and why.

    Attributes:
        trigger: what was `due`, `interval`, `kl_spike`, `stalled_validation` or the name of
            one's own; None without a reset. If several apply, the first of this list.
        source: `best` means the checkpoint of step `figures["best_step"]`.
        new_best: this step's validation is the best so far.
        figures: all that was known, JSON-able, for the event log: step, steps_since_reset,
            resets (before this one), kl, kl_median, kl_threshold, kl_spikes (in a row),
            validation (latest), best_validation, best_step, evaluations_since_best.
    """

    step: int
    reset: bool
    trigger: str | None
    source: Source
    optimizer: Optimizer
    new_best: bool
    figures: Figures


@dataclass
class _State:
    step: int = -1
    last_reset: int = 0
    resets: int = 0
    kl_history: list[float] = field(default_factory=list)
    kl_spikes: int = 0
    validation: float | None = None
    best_validation: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0


class ReferenceReset:
    """Decides after each step. One call per step, so never two resets in one.

    Attributes:
        settings, triggers: may be replaced between steps; a stage can have its own.
    """

    def __init__(self, settings: ResetSettings, triggers: Sequence[Trigger] = ()) -> None:
        self.settings = settings
        self.triggers = tuple(triggers)
        self._state = _State()

    def observe(
        self,
        step: int,
        kl: float | None = None,
        validation: float | None = None,
        metrics: Mapping[str, float] | None = None,
        due: str | None = None,
    ) -> Decision:
        """Take in a finished step and decide. If the answer is a reset, it is taken as done.

        Args:
            step: rollout step, from 1; step 0 (the untrained policy's validation) is allowed
                and never resets.
            kl: mean k2 to the reference per response token, nats. None or non-finite when no
                update was made: such a step is no evidence of anything.
            validation: mean score, if this step was validated.
            metrics: the step's metrics, for triggers of one's own.
            due: a reset that the recipe orders after this step, by its name.

        Raises:
            ValueError: a step not after the last one, or a non-finite validation score.
        """
        state, settings = self._state, self.settings
        if step <= state.step:
            raise ValueError(f"reference reset: step {step} after step {state.step}")
        if validation is not None and not math.isfinite(validation):
            raise ValueError(f"reference reset: validation score is {validation}")
        state.step = step
        if kl is not None and not math.isfinite(kl):
            kl = None
        median, threshold = self._take_kl(kl)
        new_best = validation is not None and self._take_validation(step, validation)
        figures: Figures = {
            "step": step,
            "steps_since_reset": step - state.last_reset,
            "resets": state.resets,
            "kl": kl,
            "kl_median": median,
            "kl_threshold": threshold,
            "kl_spikes": state.kl_spikes,
            "validation": state.validation,
            "best_validation": state.best_validation,
            "best_step": state.best_step,
            "evaluations_since_best": state.evaluations_since_best,
        }
        trigger = (due or self._trigger(figures, metrics or {})) if step > 0 else None
        fallen = (
            state.validation is not None
            and state.best_validation is not None
            and state.validation < state.best_validation - settings.best_margin
        )
        if trigger is not None:
            state.last_reset = step
            state.resets += 1
            state.kl_history.clear()
            state.kl_spikes = 0
            state.evaluations_since_best = 0
        return Decision(
            step=step,
            reset=trigger is not None,
            trigger=trigger,
            source="best" if settings.source == "best" and fallen else "current",
            optimizer=settings.optimizer,
            new_best=new_best,
            figures=figures,
        )

    @property
    def last_reset(self) -> int | None:
        """The step after which the reference was last reset; None before the first reset."""
        return self._state.last_reset if self._state.resets else None

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and score of the best validation so far."""
        state = self._state
        if state.best_step is None or state.best_validation is None:
            return None
        return state.best_step, state.best_validation

    def state_dict(self) -> dict[str, Any]:
        """The whole state, JSON-able."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Settings may have changed since.

        Raises:
            ValueError: keys are missing or unknown.
        """
        names = {entry.name for entry in fields(_State)}
        if set(state) != names:
            wrong = ", ".join(sorted(names ^ set(state)))
            raise ValueError(f"reference reset: saved state has missing or unknown keys: {wrong}")
        self._state = _State(**{**state, "kl_history": list(state["kl_history"])})

    def _take_kl(self, kl: float | None) -> tuple[float | None, float | None]:
        """Median and threshold that `kl` is held against; None until the window is full."""
        state, settings = self._state, self.settings
        window = state.kl_history[-settings.kl_window :]
        median = threshold = None
        if settings.kl_factor is not None and len(window) == settings.kl_window:
            median = statistics.median(window)
            threshold = max(settings.kl_factor * median, settings.kl_floor)
        if kl is not None:
            spike = threshold is not None and kl > threshold
            state.kl_spikes = state.kl_spikes + 1 if spike else 0
            state.kl_history = [*window, kl][-settings.kl_window :]
        return median, threshold

    def _take_validation(self, step: int, score: float) -> bool:
        """Whether the score is a new best."""
        state = self._state
        state.validation = score
        if state.best_validation is None or score > state.best_validation:
            state.best_validation, state.best_step = score, step
            state.evaluations_since_best = 0
            return True
        state.evaluations_since_best += 1
        return False

    def _trigger(self, figures: Figures, metrics: Mapping[str, float]) -> str | None:
        state, settings = self._state, self.settings
        since = state.step - state.last_reset
        if settings.interval is not None and since >= settings.interval:
            return "interval"
        if state.resets and since <= settings.cooldown:
            return None
        if settings.kl_factor is not None and state.kl_spikes >= settings.kl_patience:
            return "kl_spike"
        stalled = settings.stalled_evaluations
        if stalled is not None and state.evaluations_since_best >= stalled:
            return "stalled_validation"
        return next((t.name for t in self.triggers if t.fires(figures, metrics)), None)
