"""The recipe of `prorl pretrain`: a small model of one's own, from nothing to partial skill.

Our choice, for studies that need thousands of steps on two cores: no published model of a few
million parameters answers Reasoning Gym's questions at all. docs/pretraining.md lists the keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from prorl_nemo.recipe import Policy, Recipe, check_home
from prorl_nemo.recipe_data import Positive, plain_mapping
from prorl_nemo.recipe_training import Faults
from prorl_nemo.settings_file import Section, load_settings


class WorkedTask(Section):
    """Solved problems of one Reasoning Gym task."""

    task: str = Field(min_length=1, description="Registered name of the task.")
    config: dict[str, Any] = Field({}, description="The task's own settings, passed as they are.")
    problems: int = Field(
        4000,
        ge=1,
        le=1_000_000,
        description="Different training problems; narrow tasks have fewer.",
    )

    @field_validator("config")
    @classmethod
    def _plain(cls, config: dict[str, Any]) -> dict[str, Any]:
        return plain_mapping(config)


class Shape(Section):
    """The model: Qwen2's architecture, with a tied output head."""

    hidden_size: int = Field(256, ge=8, le=4096, description="Width of the residual stream.")
    intermediate_size: int = Field(704, ge=8, le=16384, description="Width of the MLP.")
    layers: int = Field(4, ge=1, le=96, description="Transformer blocks.")
    heads: int = Field(4, ge=1, le=128, description="Query heads; they divide hidden_size.")
    kv_heads: int = Field(2, ge=1, le=128, description="Key/value heads; they divide heads.")
    max_positions: int = Field(512, ge=16, le=131072, description="Longest sequence, in tokens.")
    vocab_size: int = Field(
        1024,
        ge=272,
        le=65536,
        description="Most tokens: all bytes, and words that the tasks ask their questions with.",
    )

    @model_validator(mode="after")
    def _divisible(self) -> Shape:
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ValueError("heads must divide hidden_size, and kv_heads must divide heads")
        if self.hidden_size // self.heads % 2:
            raise ValueError("hidden_size / heads must be even: rotary embedding turns pairs")
        return self


class PretrainCheckpoint(Section):
    """To go on from after a stop."""

    interval: Positive = Field(200, description="Steps between checkpoints; the last has one.")


class Exam(Section):
    """Problems the model never sees, and how likely each reference response is."""

    interval: Positive = Field(100, description="Steps between exams; the last step has one.")
    problems_per_task: int = Field(32, ge=1, le=10_000, description="Held-out problems of a task.")


class Pretraining(Section):
    """One model: its problems, its shape, its optimizer."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="Of the run and its folder; the model is written to its `model/`.",
    )
    seed: int = Field(1, ge=0, le=2**31 - 1, description="Of problems, weights and their order.")
    runs_dir: str = Field("runs", min_length=1, description="Where the run's folder is made.")
    shape: Shape = Shape()
    policy: Policy = Policy()
    faults: Faults = Faults()
    tasks: list[WorkedTask] = Field(min_length=1, description="One entry for each task.")
    steps: Positive = Field(description="Optimizer updates.")
    problems_per_step: Positive = Field(
        128, description="Problems of each update: tasks take turns, so each has the same share."
    )
    worked_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of problems whose response shows its steps, of the tasks that have any.",
    )
    loss_on: Literal["response", "all"] = Field(
        "response", description="Tokens that are predicted: the answers', or the questions' too."
    )
    exam: Exam = Exam()
    checkpoint: PretrainCheckpoint = PretrainCheckpoint()

    @field_validator("runs_dir")
    @classmethod
    def _home_exists(cls, folder: str) -> str:
        return check_home(folder)

    @model_validator(mode="after")
    def _tasks_once(self) -> Pretraining:
        names = [task.task for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks: {', '.join(twice)} is listed twice; give a task one entry")
        if self.policy.optimizer.warmup_steps >= self.steps:
            raise ValueError("policy.optimizer.warmup_steps: must be below steps")
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir).expanduser() / self.name

    def training_recipe(self, folder: Path) -> Recipe:
        """The recipe by which the trainer's ranks are built; its prompts are never drawn."""
        return Recipe.model_validate(
            {
                "name": self.name,
                "seed": self.seed,
                "runs_dir": self.runs_dir,
                "model": str(folder),
                "policy": self.policy.model_dump(),
                "faults": self.faults.model_dump(),
                "algorithm": {"minibatches": 1},
                "rollout": {"prompts_per_step": self.problems_per_step},
                "data": {"sources": [{"task": task.task} for task in self.tasks]},
                "stages": [{"steps": self.steps}],
            }
        )


def load_pretraining(path: str | Path, overrides: list[str]) -> Pretraining:
    """Read a recipe file and apply `section.key=value` overrides; see `load_settings`."""
    return load_settings(Pretraining, Path(path), overrides)
