"""The plan of a recipe on N GPUs: its own layout, the best ones, time by stage, GPU-hours."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from prorl_nemo.errors import RecipeError, UserError
from prorl_nemo.megatron.layout import ModelSpec
from prorl_nemo.planning import published
from prorl_nemo.planning.engine import Engine, Generation, engine_memory
from prorl_nemo.planning.hardware import GIB, GPUS_PER_NODE, Gpu, find_gpu
from prorl_nemo.planning.layouts import (
    FREE_SHARE,
    RUNTIME,
    Layout,
    examine,
    layouts,
    room,
)
from prorl_nemo.planning.shapes import model_shape
from prorl_nemo.planning.step_time import StepTime, Workload, step_time
from prorl_nemo.recipe import Recipe
from prorl_nemo.recipe_training import Stage
from prorl_nemo.rollout.engine_split import split_problem

MOST_GPUS = 4096


@dataclass(frozen=True)
class Assumptions:
    """What no recipe says.

    Attributes:
        mean_response: mean response over the limit.
        keep_rate: share of groups with signal.
        prompt: mean tokens of a prompt; None: 200, or the recipe's limit if that is less.
    """

    mean_response: float = published.MEAN_SHARE
    keep_rate: float = published.KEEP_RATE
    prompt: float | None = None

    def prompt_tokens(self, recipe: Recipe) -> float:
        most = float(recipe.data.max_prompt_tokens)
        return min(published.PROMPT, most) if self.prompt is None else self.prompt


@dataclass(frozen=True)
class StagePlan:
    """A stage's steps and seconds of each."""

    name: str
    steps: int
    limit: int
    samples: int
    time: StepTime


@dataclass(frozen=True)
class Plan:
    """What `prorl plan` prints. `own` is the recipe's own layout, where it has N ranks."""

    recipe: Recipe
    spec: ModelSpec
    gpu: Gpu
    gpus: int
    engine: Engine
    assumed: Assumptions
    own: Layout | None
    layouts: list[Layout]
    stages: list[StagePlan]

    @property
    def best(self) -> Layout | None:
        return self.layouts[0] if self.layouts[0].fits else None

    @property
    def chosen(self) -> Layout | None:
        """The layout that the stages' times are of: the recipe's own if it fits, or the best."""
        return self.own if self.own and self.own.fits else self.best

    @property
    def gpu_hours(self) -> float:
        return sum(map(self.stage_hours, self.stages))

    @property
    def gpu_hours_range(self) -> tuple[float, float]:
        """The same, times the least and most by which published runs differ from the model."""
        ratios = [run.ratio() for run in published.RUNS]
        return self.gpu_hours * min(ratios), self.gpu_hours * max(ratios)

    def as_json(self) -> dict[str, Any]:
        """Bytes, seconds, hours; layouts as they are listed."""
        left = room(self.gpu, self.engine)
        return {
            "recipe": self.recipe.name,
            "parameters": self.spec.parameters,
            "gpu": asdict(self.gpu),
            "gpus": self.gpus,
            "assumed": {**asdict(self.assumed), "prompt": self.assumed.prompt_tokens(self.recipe)},
            "engine_bytes": asdict(self.engine),
            "trainer_room_bytes": left,
            "runtime_bytes": RUNTIME,
            "free_share": FREE_SHARE,
            "own": _layout_json(self.own, self.recipe),
            "layouts": [_layout_json(layout, self.recipe) for layout in self.layouts],
            "stages": [
                {**asdict(s), "step_seconds": s.time.total, "gpu_hours": self.stage_hours(s)}
                for s in self.stages
            ],
            "gpu_hours": self.gpu_hours,
            "gpu_hours_range": list(self.gpu_hours_range),
        }

    def stage_hours(self, stage: StagePlan) -> float:
        return stage.steps * stage.time.total * self.gpus / 3600


def _layout_json(layout: Layout | None, recipe: Recipe) -> dict[str, Any] | None:
    if layout is None:
        return None
    memory, time = layout.memory, layout.time
    return {
        "layout": layout.policy.layout,
        "overrides": layout.overrides(recipe),
        "fits": layout.fits,
        "reason": layout.reason,
        "trainer_bytes": {**asdict(memory), "peak": memory.peak} if memory else None,
        "step_seconds": {**asdict(time), "total": time.total} if time else None,
    }


def make_plan(
    recipe: Recipe,
    gpus: int,
    gpu_name: str,
    assumed: Assumptions | None = None,
    model: str | None = None,
) -> Plan:
    """Everything about a recipe on `gpus` GPUs of a kind.

    Args:
        model: a folder or name whose shape is used in place of `recipe.model`'s.

    Raises:
        UserError: naming the option or key at fault.
    """
    assumed = assumed or Assumptions()
    gpu, spec, engine = checked(recipe, gpus, gpu_name, assumed, model)
    work = [workload(recipe, stage, assumed) for stage in recipe.stages]
    # Layouts are ranked by the stage with most to generate; the time of all is added up below.
    heaviest = max(work, key=lambda w: w.generation.mean * w.generation.samples)
    found = layouts(recipe, spec, gpu, engine, heaviest, gpus)
    own = None
    if recipe.policy.ranks == gpus:
        own = examine(recipe, spec, gpu, engine, heaviest, recipe.policy)
    chosen = own if own and own.fits else found[0]
    stages = []
    if chosen.fits:
        stages = [
            _stage_plan(recipe, spec, gpu, engine, gpus, chosen, number, assumed)
            for number in range(len(recipe.stages))
        ]
    return Plan(recipe, spec, gpu, gpus, engine, assumed, own, found, stages)


def checked(
    recipe: Recipe, gpus: int, gpu_name: str, assumed: Assumptions, model: str | None = None
) -> tuple[Gpu, ModelSpec, Engine]:
    """The GPU, the model's shape and an engine on it. Raises UserError as `make_plan`."""
    gpu = find_gpu(gpu_name)
    _check_arguments(recipe, gpus, assumed)
    spec = model_shape(model or recipe.model)
    context = recipe.data.max_prompt_tokens + recipe.longest_response
    if context > spec.max_positions:
        raise RecipeError(
            f"data.max_prompt_tokens + rollout.max_response_tokens: {context} tokens exceed the "
            f"model's {spec.max_positions} positions; lower one of them"
        )
    _check_split(recipe, spec, gpus)
    engine = engine_memory(recipe, spec, gpu)
    _check_engine(recipe, gpu, engine, context)
    return gpu, spec, engine


def _check_arguments(recipe: Recipe, gpus: int, assumed: Assumptions) -> None:
    if not 1 <= gpus <= MOST_GPUS:
        raise UserError(f"--gpus: give a number from 1 to {MOST_GPUS}, not {gpus}")
    if gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE:
        raise UserError(
            f"--gpus: {gpus} is more than a node and no whole number of nodes of {GPUS_PER_NODE}"
        )
    if not 0 < assumed.mean_response <= 1:
        raise UserError("--mean-response: a share of the response limit, above 0 and at most 1")
    if not 0 < assumed.keep_rate <= 1:
        raise UserError("--keep-rate: a share of the prompts, above 0 and at most 1")
    if not 0 < assumed.prompt_tokens(recipe) <= recipe.data.max_prompt_tokens:
        raise UserError(
            "--mean-prompt: tokens, above 0 and at most data.max_prompt_tokens "
            f"({recipe.data.max_prompt_tokens})"
        )


def _check_split(recipe: Recipe, spec: ModelSpec, gpus: int) -> None:
    ways = recipe.rollout.tensor_parallel
    problem = split_problem(
        ways, heads=spec.heads, kv_heads=spec.groups, ffn=spec.ffn, vocab=spec.vocab
    )
    if not problem and (ways > GPUS_PER_NODE or min(gpus, GPUS_PER_NODE) % ways):
        problem = f"engines of {ways} GPUs do not fill nodes of {min(gpus, GPUS_PER_NODE)}"
    if problem:
        raise RecipeError(f"rollout.tensor_parallel: {problem}")


def _check_engine(recipe: Recipe, gpu: Gpu, engine: Engine, context: int) -> None:
    needed = context * engine.token
    if engine.kv_cache < needed:
        key = "kv_cache_mib" if recipe.rollout.kv_cache_mib else "gpu_memory_share"
        raise RecipeError(
            f"rollout.{key}: one sequence of {context} tokens takes {needed / GIB:.1f} GiB of KV "
            f"cache, {max(engine.kv_cache, 0) / GIB:.1f} GiB are left beside the engine's weights "
            f"({engine.weights / GIB:.1f} GiB); raise it"
        )
    if engine.total > gpu.memory:
        raise RecipeError(
            f"rollout.kv_cache_mib: the engine takes {engine.total / GIB:.1f} GiB, an "
            f"{gpu.name} has {gpu.memory / GIB:.0f}; lower it"
        )


def workload(recipe: Recipe, stage: Stage, assumed: Assumptions) -> Workload:
    """What a step of a stage computes; validation has one task for each source. Without dynamic
    sampling the places of groups without signal stay empty."""
    rollout, validation = recipe.rollout, recipe.validation
    limit = stage.max_response_tokens or rollout.max_response_tokens
    samples = stage.samples_per_prompt or rollout.samples_per_prompt
    prompts, mean = rollout.prompts_per_step, assumed.mean_response * limit
    drawn, kept = prompts / assumed.keep_rate, prompts
    if not rollout.dynamic_sampling:
        drawn, kept = prompts, max(1, round(prompts * assumed.keep_rate))
    spread = min(published.SPREAD, 1 / assumed.mean_response)
    shape = {
        "prompt": assumed.prompt_tokens(recipe),
        "mean": mean,
        "limit": limit,
        "spread": spread,
    }
    held_out = validation.prompts_per_task * len(recipe.data.sources)
    return Workload(
        Generation(prompts=drawn, samples=samples, **shape),  # type: ignore[arg-type]
        kept,
        recipe.algorithm.minibatches,
        Generation(prompts=held_out, samples=validation.samples, **shape),  # type: ignore[arg-type]
        1 / validation.interval,
    )


def _stage_plan(
    recipe: Recipe,
    spec: ModelSpec,
    gpu: Gpu,
    engine: Engine,
    gpus: int,
    layout: Layout,
    number: int,
    assumed: Assumptions,
) -> StagePlan:
    stage = recipe.stages[number]
    work = workload(recipe, stage, assumed)
    transfer = recipe.rollout.weight_transfer
    return StagePlan(
        name=stage.name or f"stage {number + 1}",
        steps=stage.steps,
        limit=work.generation.limit,
        samples=int(work.generation.samples),
        time=step_time(spec, layout.policy, gpu, engine, gpus // engine.gpus, work, transfer),
    )
