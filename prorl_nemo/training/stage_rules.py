"""What the recipe says about a step: its stage, learning rate, length penalty and data mix."""

from __future__ import annotations

from collections.abc import Callable

from prorl_nemo.algorithms.reward_shaping import CosineLength
from prorl_nemo.data.mixture import PromptStream
from prorl_nemo.recipe import Recipe
from prorl_nemo.recipe_training import Cosine
from prorl_nemo.schedule.learning_rate import learning_rate
from prorl_nemo.schedule.stages import SETTINGS, Stages, penalty_on


class StageRules:
    """The recipe by step. The only state is in `stages`: which of them ended early."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.stages = recipe_stages(recipe)
        self._weights = [source.weight for source in recipe.data.trained]
        self._labels = [source.label for source in recipe.data.trained]

    def learning_rate(self, step: int) -> float:
        """Of the schedule, with the peak of the step's stage."""
        optimizer = self.recipe.policy.optimizer
        return learning_rate(
            step,
            peak=self.stages.at(step).learning_rate,
            total_steps=self.stages.total_steps,
            schedule=optimizer.schedule,
            warmup_steps=optimizer.warmup_steps,
            decay_steps=optimizer.decay_steps,
            floor=optimizer.min_learning_rate,
        )

    @property
    def has_cosine(self) -> bool:
        """Whether any stage may use the length penalty."""
        own = [stage.cosine for stage in self.recipe.stages]
        everywhere = self.recipe.shaping.cosine is not None and None in own
        return everywhere or any(isinstance(cosine, Cosine) for cosine in own)

    def cosine(self, step: int) -> CosineLength | None:
        """The length penalty of a step, if it is on."""
        stage = self.stages.at(step)
        own = self.recipe.stages[stage.index].cosine
        if own == "off":
            return None
        section = own or self.recipe.shaping.cosine
        counted = step if own is None else step - stage.first_step + 1
        if section is None or not penalty_on(
            counted, section.on_steps, section.off_steps, section.start_with
        ):
            return None
        return CosineLength(section.weight, section.eta_min, section.eta_max, section.correct_only)

    def opening_reset(self, step: int) -> int | None:
        """The stage that begins after this step, if the recipe wants a reset before it."""
        stage = self.stages.at(step)
        following = stage.index + 1
        ends = step == stage.last_step and following < len(self.recipe.stages)
        return following if ends and self.recipe.stages[following].reset_at_start else None

    def announce(self, step: int, on_event: Callable[..., None]) -> None:
        """Tell what begins with a step: its stage, the length penalty or its end."""
        stage = self.stages.at(step)
        if step == stage.first_step:
            before = self.stages.stages[stage.index - 1] if stage.index else None
            changes = stage.changes_from(before) if before else {}
            on_event("stage_started", stage=stage.index, stage_name=stage.name, changes=changes)
        on = self.cosine(step) is not None
        if self.has_cosine and (step == 1 or on != (self.cosine(step - 1) is not None)):
            on_event("cosine_penalty", on=on)

    def mix(self, stream: PromptStream, step: int) -> None:
        """The stage's weights of the data sources, from its first step on."""
        own = self.recipe.stages[self.stages.at(step).index].weights
        if own is None:
            stream.set_weights(self._weights)
        else:
            stream.set_weights([own.get(label, 0.0) for label in self._labels])


def recipe_stages(recipe: Recipe) -> Stages:
    """The recipe's stages with what they leave out filled in."""
    everywhere = {
        "max_response_tokens": recipe.rollout.max_response_tokens,
        "samples_per_prompt": recipe.rollout.samples_per_prompt,
        "learning_rate": recipe.policy.optimizer.learning_rate,
        "temperature": recipe.rollout.temperature,
        "clip_low": recipe.algorithm.clip_low,
        "clip_high": recipe.algorithm.clip_high,
        "truncated_factor": recipe.shaping.truncated_factor,
    }
    assert set(everywhere) == set(SETTINGS)
    keys = {"name", "steps", "ends_when_stalled", *SETTINGS}
    return Stages([stage.model_dump(include=keys) for stage in recipe.stages], everywhere)
