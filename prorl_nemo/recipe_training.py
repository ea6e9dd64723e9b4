"""The recipe's sections on a long run: stages, resets, checkpoints, faults, tracking.

Part of `recipe`, which imports all of it; docs/recipes.md is made from both.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from prorl_nemo.recipe_data import Positive
from prorl_nemo.settings_file import Section


class Cosine(Section):
    """Scheduled cosine length penalty (ProRL v2): weight * eta(length), in cycles of steps."""

    weight: float = Field(0.1, ge=0, description="lambda_len; not published, our choice 0.1.")
    eta_min: float = Field(0.0, description="Eta of a response as long as the limit.")
    eta_max: float = Field(1.0, description="Eta of an empty response.")
    on_steps: Positive = Field(100, description="Steps of each cycle with the penalty.")
    off_steps: int = Field(500, ge=0, description="Steps of each cycle without it.")
    start_with: Literal["on", "off"] = Field("on", description="Which half opens the cycle.")
    correct_only: bool = Field(
        True,
        description="Only for responses with a full score; applying it to wrong ones "
        "rewards short guessing.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Cosine:
        if self.eta_min > self.eta_max:
            raise ValueError("eta_min must not exceed eta_max: longer answers would earn more")
        return self


class ReferenceReset(Section):
    """When the reference becomes the current policy (schedule/reference_reset.py)."""

    interval: Positive | None = Field(300, description="Steps between resets; ProRL v2: 200-500.")
    kl_factor: float | None = Field(
        3.0, gt=1, description="A step's KL above this many times its recent median is a spike."
    )
    kl_window: Positive = Field(100, description="Steps the median is taken over.")
    kl_floor: float = Field(1e-3, ge=0, description="KL per token below which nothing is a spike.")
    kl_patience: Positive = Field(3, description="Spikes in a row that trigger a reset.")
    stalled_evaluations: Positive | None = Field(
        5, description="Validations in a row without a new best that trigger a reset."
    )
    cooldown: int = Field(50, ge=0, description="Steps in which only the interval may reset.")
    source: Literal["current", "best"] = Field(
        "current",
        description="The new reference: the current policy (v2), or the checkpoint of the best "
        "validation, while the latest is more than best_margin below it.",
    )
    best_margin: float = Field(0.01, ge=0, description="For source: best. 0.01 is one point.")
    optimizer: Literal["keep", "clear"] = Field("keep", description="v2 keeps; v1 cleared.")
    warmup_steps: int = Field(
        0, ge=0, description="Steps of linear learning-rate warm-up after each reset; our addition."
    )
    triggers: list[str] = Field(
        [], description="Triggers of one's own, each `module:Class` (docs/training.md)."
    )

    @field_validator("triggers")
    @classmethod
    def _named(cls, triggers: list[str]) -> list[str]:
        for name in triggers:
            module, colon, symbol = name.partition(":")
            parts = [*module.split("."), symbol]
            if not colon or not all(part.isidentifier() for part in parts):
                raise ValueError(f"{name!r} is not of the form module:Class")
        return triggers


class Checkpoint(Section):
    """Policy, optimizer, reference and every cursor, to go on from."""

    interval: Positive = Field(50, description="Steps between checkpoints; the last step has one.")
    keep_last: Positive = Field(2, description="Older checkpoints are deleted.")
    keep_every: Positive | None = Field(
        None,
        description="Checkpoints of multiples of this step stay for good, to evaluate or go back "
        "to; null is off.",
    )
    keep_best: bool = Field(
        True, description="Save each new best validation too, and keep the best one."
    )
    background: bool = Field(
        True,
        description="Write while training goes on, from a copy in host memory (16 bytes a "
        "parameter in bf16, 20 in fp32).",
    )


class Faults(Section):
    """What ends a run, and what it survives (docs/training.md)."""

    max_restarts: int = Field(
        3,
        ge=0,
        le=1000,
        description="Times the run starts its processes anew after a fault, without a new step "
        "finished between.",
    )
    silent_seconds: float = Field(
        120.0, gt=0, description="A trainer rank without a sign of life for so long is lost."
    )
    collective_seconds: float = Field(
        1800.0, gt=0, description="A trainer rank that waits so long for another one is lost."
    )
    stop_seconds: float = Field(
        300.0,
        gt=0,
        description="After SIGTERM or SIGUSR1 the run ends within this time: saved, or at the "
        "checkpoint before if the step under way takes longer.",
    )
    wall_clock_hours: float | None = Field(
        None,
        gt=0,
        description="Save and stop in time to end by then; null: by the end of the Slurm job.",
    )


class Tracking(Section):
    """Where figures go besides metrics.jsonl. A back end that is down never stops training."""

    backends: list[Literal["tensorboard", "wandb", "mlflow", "prometheus"]] = Field(
        [],
        description="Each needs its package; refused where it is not installed. prometheus serves "
        "the newest figures and says where in the run's prometheus.json.",
    )
    project: str = Field("prorl_nemo", min_length=1, description="Of wandb; experiment of mlflow.")
    offline: bool = Field(
        False, description="wandb and mlflow write below the run's folder, to be sent later."
    )


class Stage(Section):
    """A stretch of steps; what it leaves out is taken from the rest of the recipe."""

    name: str = Field("", description="For people; default: stage 1, stage 2, ...")
    steps: Positive = Field(description="Rollout steps of the stage; with a condition, at most.")
    ends_when_stalled: Positive | None = Field(
        None,
        description="End the stage after so many validations in a row without a new best of the "
        "stage.",
    )
    max_response_tokens: Positive | None = Field(None, description="As in rollout.")
    samples_per_prompt: int | None = Field(None, ge=2, le=1024, description="As in rollout.")
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="Peak rate, as in policy.optimizer."
    )
    temperature: float | None = Field(None, gt=0, le=2, description="As in rollout.")
    clip_low: float | None = Field(None, gt=0, lt=1, description="As in algorithm.")
    clip_high: float | None = Field(None, gt=0, description="As in algorithm.")
    truncated_factor: float | None = Field(None, ge=0, le=1, description="As in shaping.")
    cosine: Literal["off"] | Cosine | None = Field(
        None, description="In place of shaping.cosine; its cycles begin with the stage."
    )
    reference_reset: ReferenceReset | None = Field(
        None, description="In place of the recipe's section, whole."
    )
    reset_at_start: bool = Field(
        False, description="Reset the reference before the first step (v1's hard resets)."
    )
    weights: dict[str, float] | None = Field(
        None,
        description="Weights of tasks or domains in place of data.sources; those left out are not "
        "drawn.",
    )

    @field_validator("cosine", mode="before")
    @classmethod
    def _section_or_off(cls, value: Any) -> Any:
        # Of a union pydantic reports each option it has tried, under names of its own.
        return value if value in (None, "off") else Cosine.model_validate(value)

    @field_validator("weights")
    @classmethod
    def _positive(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        if weights is not None and (not weights or min(weights.values()) <= 0):
            raise ValueError("give at least one weight, each above 0; leave out what is not drawn")
        return weights
