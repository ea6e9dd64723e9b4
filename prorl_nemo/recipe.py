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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from prorl_nemo.settings_file import Section, load_settings, parse_settings

# A step, token or prompt count beyond the upper bound is a slip of the keyboard.
Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
Threads = Annotated[int, Field(ge=1, le=1024)]


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


class Rollout(Section):
    """Sampling with vLLM."""

    prompts_per_step: int = Field(
        256, ge=1, le=65536, description="Groups with signal that a step trains on."
    )
    samples_per_prompt: int = Field(16, ge=2, le=1024, description="Responses of a group.")
    max_response_tokens: Positive = Field(8192, description="Response limit, end of turn included.")
    temperature: float = Field(1.2, gt=0, le=2, description="ProRL v1: 1.2.")
    engines: int = Field(1, ge=1, le=4096, description="vLLM engines, a process each.")
    engine_threads: Threads | None = Field(
        None, description="CPU threads per engine; default: cores divided by engines."
    )
    precision: Literal["bf16", "fp32"] | None = Field(
        None, description="The engine's type; default: the policy's."
    )
    fp32_head: bool = Field(
        True, description="Logits in fp32 in the engine too; bf16 rounds one of 16 by up to 0.06."
    )
    kv_cache_mib: Positive | None = Field(
        None, description="KV cache per engine; default: 512 on CPU, gpu_memory_share on GPU."
    )
    gpu_memory_share: float = Field(
        0.5, gt=0, le=1, description="Share of the GPU's memory for an engine's weights and cache."
    )
    max_rejected_per_kept: float = Field(
        20.0,
        gt=0,
        le=10_000,
        description="Rejected groups per kept one in a step before the run stops.",
    )


class Source(Section):
    """One task of the data mix."""

    kind: Literal["reasoning_gym"] = Field("reasoning_gym", description="Where prompts come from.")
    task: str = Field(min_length=1, description="Registered name of the Reasoning Gym task.")
    config: dict[str, Any] = Field({}, description="The task's own settings, passed as they are.")
    weight: float = Field(1.0, gt=0, le=1_000_000, description="Relative share of the prompts.")
    size: int = Field(
        2000, ge=1, le=10_000_000, description="Training prompts generated for the task."
    )

    @field_validator("config")
    @classmethod
    def _plain(cls, config: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(config, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"numbers, strings, lists and mappings only: {error}") from None
        return config


class Data(Section):
    """Prompts."""

    sources: list[Source] = Field(min_length=1, description="The mix of tasks, one entry each.")
    worked_examples: int = Field(
        0, ge=0, le=64, description="Solved problems of the same task shown as earlier chat turns."
    )
    system_prompt: str | None = Field(
        None, description="System turn; null leaves it to the chat template."
    )
    max_prompt_tokens: Positive = Field(1024, description="Longer prompts are dropped, never cut.")


class Validation(Section):
    """Mean score on held-out prompts, the same ones every time."""

    interval: Positive = Field(10, description="Steps between validations; the last step has one.")
    prompts_per_task: int = Field(10, ge=1, le=10_000, description="Held-out prompts of each task.")
    samples: int = Field(4, ge=1, le=1024, description="Responses per prompt, averaged.")
    temperature: float = Field(0.6, gt=0, le=2, description="ProRL v1's evaluation temperature.")
    top_p: float = Field(0.95, gt=0, le=1, description="ProRL v1's evaluation top-p.")
    at_start: bool = Field(True, description="Validate the untrained policy (step 0).")


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
    optimizer: Literal["keep", "clear"] = Field("keep", description="v2 keeps; v1 cleared.")


class Checkpoint(Section):
    """Policy, optimizer, reference and every cursor, to go on from."""

    interval: Positive = Field(50, description="Steps between checkpoints; the last step has one.")
    keep_last: Positive = Field(2, description="Older checkpoints are deleted.")


class Stage(Section):
    """A stretch of steps; what it leaves out is taken from the rest of the recipe."""

    name: str = Field("", description="For people; default: stage 1, stage 2, ...")
    steps: Positive = Field(description="Rollout steps of the stage.")
    max_response_tokens: Positive | None = Field(None, description="As in rollout.")
    samples_per_prompt: int | None = Field(None, ge=2, le=1024, description="As in rollout.")
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="Peak rate, as in policy.optimizer."
    )
    temperature: float | None = Field(None, gt=0, le=2, description="As in rollout.")
    clip_low: float | None = Field(None, gt=0, lt=1, description="As in algorithm.")
    clip_high: float | None = Field(None, gt=0, description="As in algorithm.")


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
    model: str = Field(min_length=1, description="A folder, a hub name, or smollm2-135m-instruct.")
    policy: Policy = Policy()
    algorithm: Algorithm = Algorithm()
    shaping: Shaping = Shaping()
    rollout: Rollout = Rollout()
    data: Data
    validation: Validation = Validation()
    reference_reset: ReferenceReset = ReferenceReset()
    checkpoint: Checkpoint = Checkpoint()
    stages: list[Stage] = Field(min_length=1, description="One after the other.")

    @field_validator("runs_dir")
    @classmethod
    def _home_exists(cls, folder: str) -> str:
        try:
            Path(folder).expanduser()
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        return folder

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

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
        problems = list(self._problems())
        if problems:
            raise ValueError("\n  ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """What is wrong between keys that are right one by one."""
        algorithm, rollout, policy = self.algorithm, self.rollout, self.policy
        prompts, minibatches = rollout.prompts_per_step, algorithm.minibatches
        if prompts % minibatches:
            yield (
                f"algorithm.minibatches: {minibatches} does not divide rollout.prompts_per_step "
                f"({prompts})"
            )
        samples = min(s.samples_per_prompt or rollout.samples_per_prompt for s in self.stages)
        items = prompts // minibatches * (1 if policy.shared_prompts else samples)
        if items < policy.data_parallel:
            yield (
                f"algorithm.minibatches: a minibatch of {prompts // minibatches} prompts leaves "
                f"some of the {policy.data_parallel} data-parallel ranks without work; use fewer "
                "minibatches, more rollout.prompts_per_step or a smaller policy.data_parallel"
            )
        if algorithm.importance.low >= algorithm.importance.high:
            yield "algorithm.importance.low must be below algorithm.importance.high"
        if algorithm.kl.estimator == "k1" and algorithm.kl.coefficient > 0:
            yield (
                "algorithm.kl.estimator: the gradient of k1 is zero on average, so it holds "
                "nothing back; use k2 or k3, or set algorithm.kl.coefficient=0"
            )
        tasks = [source.task for source in self.data.sources]
        twice = sorted({task for task in tasks if tasks.count(task) > 1})
        if twice:
            yield f"data.sources: {', '.join(twice)} is listed twice; give a task one entry"
        overlong = self.shaping.overlong
        limit = min(s.max_response_tokens or rollout.max_response_tokens for s in self.stages)
        if overlong and overlong.buffer_tokens > limit:
            yield (
                f"shaping.overlong.buffer_tokens: {overlong.buffer_tokens} exceeds the shortest "
                f"response limit ({limit})"
            )
        if (policy.optimizer.schedule == "wsd") != (policy.optimizer.decay_steps > 0):
            yield (
                "policy.optimizer.decay_steps: belongs to policy.optimizer.schedule=wsd, which "
                "needs it; set both or neither"
            )
        optimizer = policy.optimizer
        lowest = min(s.learning_rate or optimizer.learning_rate for s in self.stages)
        if optimizer.schedule != "constant" and optimizer.min_learning_rate > lowest:
            yield (
                f"policy.optimizer.min_learning_rate: {optimizer.min_learning_rate:g} is above the "
                f"lowest peak rate of a stage ({lowest:g}); lower it"
            )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides; see `load_settings`."""
    return load_settings(Recipe, Path(path), overrides)


def parse_recipe(raw: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Check a recipe given as a mapping; see `parse_settings`."""
    return parse_settings(Recipe, raw, origin)
