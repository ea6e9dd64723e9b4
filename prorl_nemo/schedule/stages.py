"""Which stage of the recipe a step belongs to, and whether the length penalty is on.

ProRL is trained in stages (arXiv 2505.24864: eight runs, one after another, that change context
length, samples per prompt and data), and ProRL v2 switches its cosine length penalty on and off in
cycles, e.g. 100 steps on and 500 off. Steps are rollout steps, counted from 1.

A stage may end before its last step: ProRL ended its runs when validation stalled. Which ones did,
and how long the present one has stalled, is all the state there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal


@dataclass(frozen=True)
class StageSettings:
    """A stage with every setting resolved.

    Attributes:
        index: position in the recipe, from 0.
        first_step, last_step: both inclusive, from 1.
        ends_when_stalled: validations in a row without a new best of the stage that end it.
        max_response_tokens: response limit, in tokens.
        learning_rate: peak rate, before warm-up and decay.
        truncated_factor: share of its reward that a truncated response keeps.
    """

    index: int
    name: str
    first_step: int
    last_step: int
    ends_when_stalled: int | None
    max_response_tokens: int
    samples_per_prompt: int
    learning_rate: float
    temperature: float
    clip_low: float
    clip_high: float
    truncated_factor: float

    def changes_from(self, previous: StageSettings) -> dict[str, list[Any]]:
        """Settings that differ from the previous stage's, as {key: [before, now]}."""
        pairs = {key: [getattr(previous, key), getattr(self, key)] for key in SETTINGS}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


SETTINGS = tuple(field.name for field in fields(StageSettings))[5:]
"""What a stage may change: the fields after `ends_when_stalled`."""


class Stages:
    """The stages of a run, one after the other.

    Args:
        stages: per stage a mapping with `steps`, perhaps `name` and `ends_when_stalled`, and any
            of `SETTINGS`; a setting that is absent or None comes from `defaults`.
        defaults: a value for each of `SETTINGS`.

    Raises:
        ValueError: no stages, a stage without steps, an unknown key, a missing default.
    """

    def __init__(self, stages: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> None:
        if set(defaults) != set(SETTINGS):
            raise ValueError(f"stage defaults must be exactly {', '.join(SETTINGS)}")
        if not stages:
            raise ValueError("stages: at least one is needed")
        self.stages: list[StageSettings] = []
        first = 1
        for index, stage in enumerate(stages):
            unknown = sorted(set(stage) - {"name", "steps", "ends_when_stalled", *SETTINGS})
            if unknown:
                raise ValueError(f"stages.{index}: unknown keys {', '.join(unknown)}")
            steps = stage.get("steps", 0)
            if steps < 1:
                raise ValueError(f"stages.{index}.steps: must be at least 1")
            own = {key: stage[key] for key in SETTINGS if stage.get(key) is not None}
            name = stage.get("name") or f"stage {index + 1}"
            resolved = {**defaults, **own}
            stalled = stage.get("ends_when_stalled")
            if stalled is not None and stalled < 1:
                raise ValueError(f"stages.{index}.ends_when_stalled: must be at least 1")
            last = first + steps - 1
            self.stages.append(StageSettings(index, name, first, last, stalled, **resolved))
            first += steps
        self._ended: dict[int, int] = {}
        self._validated: int | None = None  # The stage of the last validation.
        self._best: float | None = None
        self._evaluations_since_best = 0

    @property
    def total_steps(self) -> int:
        """Of the run, as its stages now stand."""
        return self.stages[-1].last_step

    def at(self, step: int) -> StageSettings:
        """The stage of a step.

        Raises:
            ValueError: the step is below 1 or beyond the last stage.
        """
        for stage in self.stages:
            if stage.first_step <= step <= stage.last_step:
                return stage
        raise ValueError(f"step {step} is outside the recipe's stages (1 to {self.total_steps})")

    def observe(self, step: int, validation: float) -> bool:
        """Take in a validation after `step`; end the stage there if that is its condition.

        Returns:
            whether the stage ends early. The stages after it move up.
        """
        stage = self.at(step)
        if self._validated not in (stage.index, None):
            # Here, and not when a stage ends: its last step need not be validated.
            self._best, self._evaluations_since_best = None, 0
        self._validated = stage.index
        if self._best is None or validation > self._best:
            self._best, self._evaluations_since_best = validation, 0
        else:
            self._evaluations_since_best += 1
        limit = stage.ends_when_stalled
        if step == stage.last_step or limit is None or self._evaluations_since_best < limit:
            return False
        self._end(stage.index, step)
        return True

    def _end(self, index: int, step: int) -> None:
        self._ended[index] = step
        early = self.stages[index].last_step - step
        self.stages[index] = replace(self.stages[index], last_step=step)
        for later in range(index + 1, len(self.stages)):
            stage = self.stages[later]
            self.stages[later] = replace(
                stage, first_step=stage.first_step - early, last_step=stage.last_step - early
            )

    def state_dict(self) -> dict[str, Any]:
        """Which stages ended early, and how long the present one has stalled; JSON-able."""
        return {
            "ended": [[index, step] for index, step in self._ended.items()],
            "validated": self._validated,
            "best": self._best,
            "evaluations_since_best": self._evaluations_since_best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. The stages must be as the recipe has them, none ended."""
        for index, step in state["ended"]:
            self._end(index, step)
        self._validated = state.get("validated")  # Older checkpoints do not say.
        self._best = state["best"]
        self._evaluations_since_best = state["evaluations_since_best"]


def penalty_on(
    step: int, on_steps: int, off_steps: int, start_with: Literal["on", "off"] = "on"
) -> bool:
    """Whether the cosine length penalty applies in this step.

    Cycles of `on_steps + off_steps` repeat from step 1. Stages do not restart them, unless they
    have a cycle of their own: `step` is then counted from the stage's first.

    Raises:
        ValueError: step below 1, negative phases, or an empty cycle.
    """
    if step < 1 or on_steps < 0 or off_steps < 0 or on_steps + off_steps == 0:
        raise ValueError("penalty cycle needs step >= 1, phases >= 0 and not both 0")
    position = (step - 1) % (on_steps + off_steps)
    return position < on_steps if start_with == "on" else position >= off_steps
