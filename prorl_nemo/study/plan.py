"""What a study consists of: one recipe, the changes that make its variants, seeds, probes.

Our choice: a variant is a list of overrides, so that what differs between two curves can be read
off one line, and nothing else can differ. All runs begin with one model, which is committed beside
the results: bf16 products differ between processors, so another machine would make another one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from prorl_nemo.errors import UserError
from prorl_nemo.recipe import Recipe, load_recipe
from prorl_nemo.recipe_data import Positive
from prorl_nemo.settings_file import Section, load_settings
from prorl_nemo.training.run_dir import RESUMABLE

MAIN = "main"


class Variant(Section):
    """The recipe with some settings changed."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$", max_length=40, description="Of its runs.")
    question: str = Field(min_length=1, description="What it answers, for people.")
    overrides: list[str] = Field([], description="section.key=value, as on the command line.")
    seeds: list[int] = Field([1, 2, 3], min_length=1, description="One run each.")
    expected: Literal["lower", "higher"] | None = Field(
        None,
        description="Than the main run's mean score, if the paper is right; null: it says none.",
    )

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("seeds must be different numbers from 0")
        return seeds


class Probe(Section):
    """Many samples of each held-out prompt, before the first step and after the last one.

    The first model is asked once for all runs.
    """

    prompts_per_task: int = Field(16, ge=1, le=1000, description="Held-out prompts of each task.")
    samples: int = Field(256, ge=2, le=4096, description="Samples of a prompt, at temperature 1.")
    variants: list[str] = Field([MAIN], description="Whose last model is asked; the others' not.")


class Study(Section):
    """The whole study."""

    pretraining: str = Field(min_length=1, description="Recipe of the model (`prorl pretrain`).")
    model: str = Field(
        min_length=1,
        description="Folder of the model that all runs begin with, committed with the results; "
        "made by `pretraining` where it is not there.",
    )
    recipe: str = Field(min_length=1, description="Recipe of the main run.")
    results: str = Field(min_length=1, description="Folder of what is committed of each run.")
    probe: Probe = Probe()
    compare_at: Positive = Field(
        1000, description="Step at which variants are compared with the main runs."
    )
    variants: list[Variant] = Field(min_length=1, description="`main` first; run in this order.")
    # Of the machine that runs it, so no key of the file.
    _where: list[str] = PrivateAttr([])

    @model_validator(mode="after")
    def _main_first(self) -> Study:
        names = [variant.name for variant in self.variants]
        if names[0] != MAIN or self.variants[0].overrides:
            raise ValueError("variants: the first is the recipe itself: `main`, without overrides")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"variants: {', '.join(twice)} is listed twice")
        unknown = sorted(set(self.probe.variants) - set(names))
        if unknown:
            raise ValueError(f"probe.variants: there is no variant {', '.join(unknown)}")
        return self

    @property
    def main_recipe(self) -> Recipe:
        """The recipe without changes: every model is probed by it, whatever it was trained by."""
        return load_recipe(self.recipe, [*self._where, self._model])

    def recipe_of(self, variant: Variant, seed: int) -> Recipe:
        """The recipe of one run.

        Raises:
            RecipeError: an override that the recipe refuses.
        """
        name = run_name(variant.name, seed)
        own = [f"seed={seed}", f"name={name}", self._model]
        return load_recipe(self.recipe, [*variant.overrides, *self._where, *own])

    @property
    def _model(self) -> str:
        # A text in JSON is one in YAML.
        return f"model={json.dumps(self.model)}"

    def result_file(self, variant: str, seed: int) -> Path:
        return Path(self.results) / f"{variant}_seed{seed}.json"


def run_name(variant: str, seed: int) -> str:
    return f"study-{variant}-seed{seed}"


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study's file.

    Args:
        overrides: section.key=value, of every run and of the probes, after a variant's own.

    Raises:
        RecipeError: as `load_settings`.
        UserError: an override that could change results.
    """
    study = load_settings(Study, path)
    for override in overrides:
        key = override.partition("=")[0]
        if key not in RESUMABLE:
            raise UserError(
                f"{key}: a study takes KEY=VALUE of settings alone that change where and how fast "
                "its runs compute (marked ↻ in docs/recipes.md); results may differ by its "
                "variants: give it a variant with this override"
            )
    study._where = list(overrides)
    return study
