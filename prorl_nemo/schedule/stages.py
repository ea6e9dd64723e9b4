"""Which stage of the recipe a step belongs to, and whether the length penalty is on.

ProRL is trained in stages (arXiv 2505.24864: eight runs, one after another, that change context
length, samples per prompt and data), and ProRL v2 switches its cosine length penalty on and off in
cycles, e.g. 100 steps on and 500 off. Steps are rollout steps, counted from 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True)
class StageSettings:
    """A stage with every setting resolved.

    Attributes:
        index: position in the recipe, from 0.
        first_step, last_step: both inclusive, from 1.
        max_response_tokens: response limit, in tokens.
        learning_rate: peak rate, before warm-up and decay.
    """

    index: int
    name: str
    first_step: int
    last_step: int
    max_response_tokens: int
    samples_per_prompt: int
    learning_rate: float
    temperature: float
    clip_low: float
    clip_high: float

    def changes_from(self, previous: StageSettings) -> dict[str, list[Any]]:
        """Settings that differ from the previous stage's, as {key: [before, now]}."""
        pairs = {key: [getattr(previous, key), getattr(self, key)] for key in SETTINGS}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


SETTINGS = tuple(field.name for field in fields(StageSettings))[4:]
"""What a stage may change: the fields after `last_step`."""


class Stages:
    """The stages of a run, one after the other.

    Args:
        stages: per stage a mapping with `steps`, perhaps `name`, and any of `SETTINGS`;
            a setting that is absent or None comes from `defaults`.
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
            unknown = sorted(set(stage) - {"name", "steps", *SETTINGS})
            if unknown:
                raise ValueError(f"stages.{index}: unknown keys {', '.join(unknown)}")
            steps = stage.get("steps", 0)
            if steps < 1:
                raise ValueError(f"stages.{index}.steps: must be at least 1")
            own = {key: stage[key] for key in SETTINGS if stage.get(key) is not None}
            name = stage.get("name") or f"stage {index + 1}"
            resolved = {**defaults, **own}
            self.stages.append(StageSettings(index, name, first, first + steps - 1, **resolved))
            first += steps

    @property
    def total_steps(self) -> int:
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


def penalty_on(
    step: int, on_steps: int, off_steps: int, start_with: Literal["on", "off"] = "on"
) -> bool:
    """Whether the cosine length penalty applies in this step.

    Cycles of `on_steps + off_steps` repeat from step 1 to the end of the run; stages do not
    restart them.

    Raises:
        ValueError: step below 1, negative phases, or an empty cycle.
    """
    if step < 1 or on_steps < 0 or off_steps < 0 or on_steps + off_steps == 0:
        raise ValueError("penalty cycle needs step >= 1, phases >= 0 and not both 0")
    position = (step - 1) % (on_steps + off_steps)
    return position < on_steps if start_with == "on" else position >= off_steps
