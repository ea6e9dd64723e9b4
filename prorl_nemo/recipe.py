"""The recipe: every setting of a run, typed, documented and checked.

One YAML file describes one experiment. Unknown keys are errors,
because a misspelt key that is silently ignored is a wrong experiment. Defaults
follow ProRL v2 where it is published; where sources disagree the description
names the source and the alternative (see docs/algorithm.md). docs/recipes.md is
made from this file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from prorl_nemo.recipe_checks import contradictions
from prorl_nemo.recipe_data import Data, Grading, Positive, Threads
from prorl_nemo.recipe_rollout import Rollout
from prorl_nemo.recipe_training import (
    Checkpoint,
    Cosine,
    Faults,
    ReferenceReset,
    Stage,
    Tracking,
)
from prorl_nemo.settings_file import Section, load_settings, parse_settings

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """AdamW and its learning rate."""

    learning_rate: float = Field(
        2e-6, gt=0, le=1, description="Peak rate. ProRL v1: 2e-6 constant."
    )
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field(
        (0.9, 0.999), description="Decay of Adam's two moments."
    )
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    moments: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Type Adam's moments are kept in. bf16, rounded stochastically, saves 4 bytes "
        "a parameter.",
    )
    weight_decay: float = Field(
        0.01, ge=0, description="Decoupled weight decay; none on norms and biases."
    )
    clip_grad: float = Field(1.0, ge=0, description="Global gradient norm limit; 0 is off.")
    warmup_steps: int = Field(0, ge=0, description="Linear warm-up, in rollout steps.")
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = Field(
        "constant",
        description="After the warm-up, to the last step of the last stage. wsd is constant, then "
        "linear over the last decay_steps.",
    )
    decay_steps: int = Field(0, ge=0, description="For wsd: rollout steps of the final decay.")
    min_learning_rate: float = Field(0.0, ge=0, description="Floor of a decaying schedule.")
    max_skipped_updates: int = Field(
        5, ge=1, description="Updates in a row with NaN or infinite gradients before the run stops."
    )


class Policy(Section):
    """The trained model on Megatron-Core: precision, layout, memory, optimizer."""

    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Parameter and activation type; main weights and gradients are fp32."
    )
    logits: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Type of the output head's products. bf16, the usual in other trainers, is "
        "faster where hardware multiplies it faster, and rounds a logit of 16 by up to 0.06.",
    )
    fp8: Literal["delayed", "blockwise", "mxfp8"] | None = Field(
        None, description="FP8 scaling through Transformer Engine; refused where it is absent."
    )
    tensor_parallel: Positive = Field(1, description="Ranks that share each layer's matrices.")
    sequence_parallel: bool = Field(
        False,
        description="The tensor-parallel ranks share the tokens outside the matrices as well; less "
        "activation memory. Needs tensor_parallel above 1.",
    )
    pipeline_parallel: Positive = Field(1, description="Ranks that share the layers, in order.")
    virtual_pipeline: Positive = Field(
        1,
        description="Stretches of layers per pipeline rank; more than 1 interleaves the schedule "
        "(smaller bubble, more messages). Needs pipeline_parallel above 1.",
    )
    context_parallel: Positive = Field(
        1,
        description="Ranks that share the tokens of each row, for long responses. Needs "
        "shared_prompts: false.",
    )
    data_parallel: Positive = Field(1, description="Copies of the model; they split the batch.")
    tokens_per_microbatch: Positive = Field(
        4096, description="Token budget of one packed row; a longer sequence gets a row of its own."
    )
    shared_prompts: bool = Field(
        True, description="Compute a group's prompt once for all its responses in a packed row."
    )
    attention: Literal["sdpa", "flex"] = Field(
        "sdpa",
        description="sdpa: prompts and responses of like lengths in padded batches. flex: one "
        "block-sparse kernel for a row, on GPUs only, without context_parallel.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="Activation recomputation of Megatron-Core."
    )
    threads: Threads | None = Field(
        None, description="CPU threads per trainer rank; default: cores divided by ranks."
    )
    optimizer: Optimizer = Optimizer()

    @property
    def ranks(self) -> int:
        """Trainer processes."""
        model = self.tensor_parallel * self.pipeline_parallel * self.context_parallel
        return model * self.data_parallel

    @property
    def layout(self) -> str:
        """The axes that are used, by the field's short names: `TP 2, SP, PP 2, VPP 4`."""
        sizes = {
            "TP": self.tensor_parallel,
            "PP": self.pipeline_parallel,
            "VPP": self.virtual_pipeline,
            "CP": self.context_parallel,
            "DP": self.data_parallel,
        }
        parts = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        if self.sequence_parallel:
            parts.insert(1, "SP")
        return ", ".join(parts) or "one rank"

    def on_one_rank(self) -> Policy:
        """A copy that computes the same in a single process."""
        axes = ("tensor", "pipeline", "context", "data")
        alone: dict[str, Any] = {f"{axis}_parallel": 1 for axis in axes}
        return self.model_copy(
            update={**alone, "virtual_pipeline": 1, "sequence_parallel": False}, deep=True
        )


class KL(Section):
    """The KL term of the loss, to the reference policy (docs/algorithm.md)."""

    estimator: Literal["k1", "k2", "k3"] = Field(
        "k2",
        description="ProRL v2: k2. k1 has no effect on average: only with coefficient 0, to watch.",
    )
    coefficient: float = Field(1e-4, ge=0, description="Beta. Technical report of v1: 1e-4.")
    input_clamp: float | None = Field(
        10.0, gt=0, description="Clamp of the log-ratio. ProRL v2: 10; NeMo-RL: 20."
    )
    output_clamp: float | None = Field(
        None, gt=0, description="Clamp of the estimate. NeMo-RL and OpenRLHF: 10; ProRL v2: none."
    )


class ImportanceCorrection(Section):
    """Weights for the difference between the engine's and the trainer's probabilities."""

    method: Literal["none", "tis", "icepop", "seq-mask-tis"] = Field(
        "icepop", description="Correction of the engine/trainer mismatch."
    )
    low: float = Field(0.5, ge=0, description="Lower bound of trainer / engine probability.")
    high: float = Field(
        5.0, gt=0, description="Upper bound. seq-mask-tis wants narrow ones: NeMo-RL 0.999-1.002."
    )


class Algorithm(Section):
    """Advantages, the clipped loss, and how many updates a rollout is used for."""

    advantage: Literal["reinforce_plus_plus_baseline", "grpo"] = Field(
        "reinforce_plus_plus_baseline", description="ProRL v2; v1: grpo."
    )
    statistics: Literal["token", "sequence"] = Field(
        "token", description="Batch mean and deviation over response tokens (as NeMo-RL, OpenRLHF)."
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="The ratio is clipped at 1 - clip_low.")
    clip_high: float = Field(0.28, gt=0, description="ProRL v2: 0.28; v1: 0.4; NeMo-RL: 0.27.")
    dual_clip: float | None = Field(None, gt=1, description="Off in ProRL; verl's default is 3.")
    minibatches: Positive = Field(
        4, description="Optimizer updates per rollout. With 1 the clip bounds do nothing."
    )
    kl: KL = KL()
    importance: ImportanceCorrection = ImportanceCorrection()


class Overlong(Section):
    """DAPO's soft overlong penalty: 0 up to (limit - buffer), then linear to -weight."""

    buffer_tokens: Positive = Field(4096, description="Tokens before the limit that cost.")
    weight: float = Field(1.0, ge=0, description="Penalty at the limit.")


class Shaping(Section):
    """From raw scores to the rewards that are trained on."""

    truncated_factor: float = Field(
        0.0, ge=0, le=1, description="Stop-properly: a truncated response keeps this share."
    )
    overlong: Overlong | None = Field(None, description="DAPO's length penalty; null is off.")
    cosine: Cosine | None = Field(Cosine(), description="Cosine length penalty; null is off.")


class Validation(Section):
    """Mean score on held-out prompts, the same ones every time."""

    interval: Positive = Field(10, description="Steps between validations; the last step has one.")
    prompts_per_task: int = Field(10, ge=1, le=10_000, description="Held-out prompts of each task.")
    samples: int = Field(4, ge=1, le=1024, description="Responses per prompt, averaged.")
    temperature: float = Field(0.6, gt=0, le=2, description="ProRL v1's evaluation temperature.")
    top_p: float = Field(0.95, gt=0, le=1, description="ProRL v1's evaluation top-p.")
    at_start: bool = Field(True, description="Validate the untrained policy (step 0).")


class Recipe(Section):
    """A whole experiment."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="Of the run and its folder: letters, digits, dot, dash, underscore.",
    )
    seed: int = Field(
        1, ge=0, le=2**31 - 1, description="Of prompts, samples and the trainer's random state."
    )
    runs_dir: str = Field(
        "runs", min_length=1, description="Where the run's folder is made; `~` is the home folder."
    )
    model: str = Field(
        min_length=1, description="A folder, a hub name, smollm2-135m-instruct or tiny-arithmetic."
    )
    policy: Policy = Policy()
    algorithm: Algorithm = Algorithm()
    shaping: Shaping = Shaping()
    rollout: Rollout = Rollout()
    data: Data
    grading: Grading = Grading()
    validation: Validation = Validation()
    reference_reset: ReferenceReset = ReferenceReset()
    checkpoint: Checkpoint = Checkpoint()
    faults: Faults = Faults()
    tracking: Tracking = Tracking()
    stages: list[Stage] = Field(min_length=1, description="One after the other.")

    @field_validator("runs_dir")
    @classmethod
    def _home_exists(cls, folder: str) -> str:
        return check_home(folder)

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def longest_response(self) -> int:
        """Response limit of the stage with the longest, in tokens."""
        default = self.rollout.max_response_tokens
        return max(stage.max_response_tokens or default for stage in self.stages)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir).expanduser() / self.name

    @property
    def fingerprint(self) -> str:
        """Hash of all settings, by which a run directory knows its recipe."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = list(contradictions(self))
        if problems:
            raise ValueError("\n  ".join(problems))
        return self


def check_home(folder: str) -> str:
    """The folder itself, if its `~` means something. Raises ValueError."""
    try:
        Path(folder).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return folder


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides; see `load_settings`."""
    return load_settings(Recipe, Path(path), overrides)


def parse_recipe(raw: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Check a recipe given as a mapping; see `parse_settings`."""
    return parse_settings(Recipe, raw, origin)
