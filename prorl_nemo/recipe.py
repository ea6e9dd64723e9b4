"""The recipe: every setting of a run, typed, documented and checked.

One YAML file describes one experiment. Unknown keys are errors, because a
misspelt key that is silently ignored is a wrong experiment. Defaults follow
ProRL v2 where it is published; where sources disagree the description names
the source and the alternative (see docs/algorithm.md).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prorl_nemo.errors import RecipeError

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of the recipe. Unknown keys are refused, numbers must be finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)


class Optimizer(Section):
    learning_rate: float = Field(2e-6, gt=0, description="Peak rate. ProRL v1: 2e-6 constant.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW betas.")
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_grad: float = Field(1.0, ge=0, description="Global gradient norm limit; 0 is off.")
    warmup_steps: int = Field(0, ge=0, description="Linear warm-up, in rollout steps.")
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    min_learning_rate: float = Field(0.0, ge=0, description="Floor of a decaying schedule.")
    max_skipped_updates: int = Field(
        5, ge=1, description="Updates in a row with NaN or infinite gradients before the run stops."
    )


class Policy(Section):
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Parameter and activation type; main weights and gradients are fp32."
    )
    fp8: Literal["delayed", "blockwise", "mxfp8"] | None = Field(
        None, description="FP8 scaling through Transformer Engine; refused where it is absent."
    )
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    data_parallel: Positive = 1
    tokens_per_microbatch: Positive = Field(
        4096, description="Token budget of one packed row; a longer sequence gets a row of its own."
    )
    shared_prompts: bool = Field(
        True, description="Compute a group's prompt once for all its responses in a packed row."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="Activation recomputation of Megatron-Core."
    )
    threads: Positive | None = Field(
        None, description="CPU threads per trainer rank; default: cores divided by ranks."
    )
    optimizer: Optimizer = Optimizer()

    @property
    def ranks(self) -> int:
        """Trainer processes."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


class KL(Section):
    estimator: Literal["k1", "k2", "k3"] = Field("k2", description="ProRL v2: k2.")
    coefficient: float = Field(1e-4, ge=0, description="Beta. Technical report of v1: 1e-4.")
    input_clamp: float | None = Field(
        10.0, gt=0, description="Clamp of the log-ratio. ProRL v2: 10; NeMo-RL: 20."
    )
    output_clamp: float | None = Field(
        None, gt=0, description="Clamp of the estimate. NeMo-RL and OpenRLHF: 10; ProRL v2: none."
    )


class ImportanceCorrection(Section):
    method: Literal["none", "tis", "icepop", "seq-mask-tis"] = Field(
        "icepop", description="Correction of the engine/trainer mismatch."
    )
    low: float = Field(0.5, ge=0)
    high: float = Field(5.0, gt=0)


class Algorithm(Section):
    advantage: Literal["reinforce_plus_plus_baseline", "grpo"] = "reinforce_plus_plus_baseline"
    statistics: Literal["token", "sequence"] = Field(
        "token", description="Batch mean and deviation over response tokens (as NeMo-RL, OpenRLHF)."
    )
    clip_low: float = Field(0.2, gt=0, lt=1)
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
    eta_min: float = 0.0
    eta_max: float = 1.0
    on_steps: Positive = Field(100, description="Steps of each cycle with the penalty.")
    off_steps: int = Field(500, ge=0, description="Steps of each cycle without.")
    start_with: Literal["on", "off"] = Field("on", description="Which half opens the cycle.")
    correct_only: bool = Field(
        True, description="Only for responses with a full score; applying it to wrong ones "
        "rewards short guessing."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Cosine:
        if self.eta_min > self.eta_max:
            raise ValueError("eta_min must not exceed eta_max: longer answers would earn more")
        return self


class Overlong(Section):
    """DAPO's soft overlong penalty: 0 up to (limit - buffer), then linear to -weight."""

    buffer_tokens: Positive = 4096
    weight: float = Field(1.0, ge=0)


class Shaping(Section):
    truncated_factor: float = Field(
        0.0, ge=0, le=1, description="Stop-properly: a truncated response keeps this share."
    )
    overlong: Overlong | None = None
    cosine: Cosine | None = Cosine()


class Rollout(Section):
    prompts_per_step: Positive = 256
    samples_per_prompt: int = Field(16, ge=2)
    max_response_tokens: Positive = 8192
    temperature: float = Field(1.2, gt=0, le=2, description="ProRL v1: 1.2.")
    engines: Positive = 1
    engine_threads: Positive | None = Field(
        None, description="CPU threads per engine; default: all cores."
    )
    precision: Literal["bf16", "fp32"] | None = Field(
        None, description="The engine's type; default: the policy's."
    )
    kv_cache_mib: Positive | None = Field(None, description="KV cache on CPU; default 512 MiB.")
    gpu_memory_share: Share = Field(0.5, description="Share of GPU memory for a colocated engine.")
    max_rejected_per_kept: float = Field(
        20.0, gt=0, description="Rejected groups per kept one in a step before the run stops."
    )


class Source(Section):
    """One task of the data mix."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    config: dict[str, Any] = Field({}, description="The task's own settings, passed as they are.")
    weight: float = Field(1.0, gt=0)
    size: Positive = Field(2000, description="Training prompts generated for the task.")


class Data(Section):
    sources: list[Source] = Field(min_length=1)
    worked_examples: int = Field(
        0, ge=0, description="Solved problems of the same task shown as earlier chat turns."
    )
    system_prompt: str | None = None
    max_prompt_tokens: Positive = 1024


class Validation(Section):
    interval: Positive = 10
    prompts_per_task: Positive = 10
    samples: Positive = 4
    temperature: float = Field(0.6, gt=0, description="ProRL v1's evaluation temperature.")
    top_p: float = Field(0.95, gt=0, le=1)
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
    interval: Positive = 50
    keep_last: Positive = 2


class Stage(Section):
    """A stretch of steps; what it leaves out is taken from the rest of the recipe."""

    name: str = ""
    steps: Positive
    max_response_tokens: Positive | None = None
    samples_per_prompt: int | None = Field(None, ge=2)
    learning_rate: float | None = Field(None, gt=0)
    temperature: float | None = Field(None, gt=0, le=2)
    clip_low: float | None = Field(None, gt=0, lt=1)
    clip_high: float | None = Field(None, gt=0)


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(1, ge=0)
    runs_dir: str = "runs"
    model: str = Field(description="A folder, a hub name, or smollm2-135m-instruct.")
    policy: Policy = Policy()
    algorithm: Algorithm = Algorithm()
    shaping: Shaping = Shaping()
    rollout: Rollout = Rollout()
    data: Data
    validation: Validation = Validation()
    reference_reset: ReferenceReset = ReferenceReset()
    checkpoint: Checkpoint = Checkpoint()
    stages: list[Stage] = Field(min_length=1)

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def fingerprint(self) -> str:
        """Hash of all settings, by which a run directory knows its recipe."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.rollout.prompts_per_step % self.algorithm.minibatches:
            raise ValueError(
                f"algorithm.minibatches: {self.algorithm.minibatches} does not divide "
                f"rollout.prompts_per_step ({self.rollout.prompts_per_step})"
            )
        importance = self.algorithm.importance
        if importance.low >= importance.high:
            raise ValueError("algorithm.importance.low must be below algorithm.importance.high")
        names = [source.task for source in self.data.sources]
        if len(set(names)) != len(names):
            raise ValueError("data.sources: a task is listed twice; give it one entry")
        overlong = self.shaping.overlong
        limits = [s.max_response_tokens or self.rollout.max_response_tokens for s in self.stages]
        if overlong and overlong.buffer_tokens > min(limits):
            raise ValueError(
                f"shaping.overlong.buffer_tokens: {overlong.buffer_tokens} exceeds the shortest "
                f"response limit ({min(limits)})"
            )
        return self


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides (values are YAML).

    Raises:
        RecipeError: unreadable file, bad YAML, unknown key, wrong type or value out of range;
            the message names every key at fault and what to do.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, found {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Check a recipe given as a mapping. Raises RecipeError as `load_recipe` does."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise RecipeError(f"{origin}:\n  " + "\n  ".join(lines)) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"override {override!r}: write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: the value is not valid YAML") from None
    node: Any = raw
    *parents, leaf = key.split(".")
    for part in parents:
        node = _descend(node, part, override)
    if isinstance(node, list):
        node[_list_index(node, leaf, override)] = value
    else:
        node[leaf] = value


def _descend(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        child = node[_list_index(node, part, override)]
    else:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
    if not isinstance(child, dict | list):
        raise RecipeError(f"override {override!r}: {part} is a value, it has no keys below it")
    return child


def _list_index(node: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise RecipeError(f"override {override!r}: {part} must be an index below {len(node)}")
    return int(part)


def _explain(error: Any) -> str:
    """One line of pydantic's verdict, naming the key and, for a misspelling, the nearest one."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else "known keys: " + ", ".join(sorted(known))
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: required, but missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (found {error['input']!r:.80})" if key else message


def _known_keys(parents: list[str]) -> list[str]:
    """Keys of the section that `parents` leads to (indices of lists are passed over)."""
    section: type[BaseModel] = Recipe
    for part in parents:
        if part in section.model_fields:
            found = _section_of(section.model_fields[part].annotation)
            if found is None:
                return []
            section = found
    return list(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found:
            return found
    return None
