"""The reset rules of each stage: the recipe's, the stage's own, and triggers of the user's own."""

from __future__ import annotations

import importlib
from dataclasses import fields

from prorl_nemo.errors import RecipeError
from prorl_nemo.recipe import Recipe
from prorl_nemo.schedule.reference_reset import ResetSettings, Trigger


class ResetRules:
    """Settings and triggers by stage. Triggers are built once and hold no state.

    Raises:
        RecipeError: a trigger that cannot be imported, or is none.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._sections = [
            stage.reference_reset or recipe.reference_reset for stage in recipe.stages
        ]
        names = dict.fromkeys(name for section in self._sections for name in section.triggers)
        self._triggers = {name: load_trigger(name) for name in names}

    def settings(self, stage: int) -> ResetSettings:
        section = self._sections[stage]
        return ResetSettings(**{f.name: getattr(section, f.name) for f in fields(ResetSettings)})

    def triggers(self, stage: int) -> tuple[Trigger, ...]:
        return tuple(self._triggers[name] for name in self._sections[stage].triggers)

    def warmup(self, stage: int, step: int, last_reset: int | None) -> float:
        """Factor of the learning rate in `step`: step k of w after a reset has k / w, as a run's
        own warm-up; 1 afterwards and before any reset."""
        steps = self._sections[stage].warmup_steps
        if last_reset is None or step - last_reset >= steps:
            return 1.0
        return (step - last_reset) / steps


def load_trigger(name: str) -> Trigger:
    """An instance of `module:Class`, built without arguments.

    The module is code of the user's own: it must be importable (installed, or on PYTHONPATH).

    Raises:
        RecipeError: no such module or class, or it lacks `name` or `fires`.
    """
    key = "reference_reset.triggers"
    module, _, symbol = name.partition(":")
    try:
        trigger = getattr(importlib.import_module(module), symbol)()
    except Exception as error:  # The module may raise anything.
        raise RecipeError(
            f"{key}: {name} cannot be loaded ({type(error).__name__}: {error}); give module:Class "
            "of a class that needs no arguments, with its folder on PYTHONPATH"
        ) from None
    if not isinstance(getattr(trigger, "name", None), str) or not callable(
        getattr(trigger, "fires", None)
    ):
        raise RecipeError(f"{key}: {name} needs a `name` (text) and a method `fires`")
    found: Trigger = trigger
    return found
