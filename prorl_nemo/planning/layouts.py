"""All ways to spread the policy over N GPUs, the best that fits first, and why others do not.

A layout is the sizes of the axes, with the cheapest recomputation and the longest rows that fit.
Every GPU holds a trainer rank and an engine, or its share of one (docs/architecture.md): the number
of engines follows from N and `rollout.tensor_parallel`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prorl_nemo.errors import RecipeError
from prorl_nemo.megatron.layout import ModelSpec, check_layout
from prorl_nemo.megatron.precision import check_fp8
from prorl_nemo.planning.activations import Row
from prorl_nemo.planning.engine import Engine
from prorl_nemo.planning.hardware import GIB, GPUS_PER_NODE, Gpu
from prorl_nemo.planning.memory import TrainerMemory, trainer_memory
from prorl_nemo.planning.step_time import StepTime, Workload, step_time
from prorl_nemo.recipe import Policy, Recipe

# CUDA's context of the two processes, NCCL's buffers. Our choice, as is the share kept free
# because torch's allocator cannot fill every gap.
RUNTIME = 2 * GIB
FREE_SHARE = 0.05
RECOMPUTE = ("none", "selective", "full")
EQUAL = 0.05
"""Step times that differ by less count as equal: then the fewest model-parallel ranks win."""
_AXES = ("tensor_parallel", "pipeline_parallel", "context_parallel", "data_parallel")


@dataclass(frozen=True)
class Layout:
    """One layout and what it takes; `reason` says why it does not fit, and is empty if it does."""

    policy: Policy
    row: Row
    memory: TrainerMemory | None
    time: StepTime | None
    reason: str = ""

    @property
    def fits(self) -> bool:
        return not self.reason

    def overrides(self, recipe: Recipe) -> list[str]:
        """`key=value` of what differs from the recipe, for the command line."""
        keys = (*_AXES, "sequence_parallel", "virtual_pipeline", "shared_prompts", "recompute")
        changed = [
            f"policy.{key}={str(getattr(self.policy, key)).lower()}"
            for key in (*keys, "tokens_per_microbatch")
            if getattr(self.policy, key) != getattr(recipe.policy, key)
        ]
        engines = self.policy.ranks // recipe.rollout.tensor_parallel
        return changed + [f"rollout.engines={engines}"] * (recipe.rollout.engines != engines)


def room(gpu: Gpu, engine: Engine) -> int:
    """Bytes for the trainer while it works, beside its engine."""
    return int(gpu.memory * (1 - FREE_SHARE)) - RUNTIME - engine.beside_updates


def examine(
    recipe: Recipe, spec: ModelSpec, gpu: Gpu, engine: Engine, work: Workload, policy: Policy
) -> Layout:
    """What a layout takes, or why it does not fit."""
    row = Row.largest(policy, recipe.data.max_prompt_tokens, recipe.longest_response)
    reason = _refused(recipe, spec, gpu, policy)
    if reason:
        return Layout(policy, row, None, None, reason)
    memory = trainer_memory(spec, policy, row)
    engines, transfer = policy.ranks // engine.gpus, recipe.rollout.weight_transfer
    time = step_time(spec, policy, gpu, engine, engines, work, transfer)
    left = room(gpu, engine)
    if memory.peak > left:
        reason = (
            f"memory: the trainer needs {memory.peak / GIB:.1f} GiB at its peak, "
            f"{max(left, 0) / GIB:.1f} GiB are left beside the engine"
        )
    elif memory.standing > left - (engine.total - engine.beside_updates):
        reason = (
            f"memory: weights, gradients and optimizer stay while the engine works: "
            f"{memory.standing / GIB:.1f} GiB, beside its {engine.total / GIB:.1f} GiB"
        )
    return Layout(policy, row, memory, time, reason)


def layouts(
    recipe: Recipe, spec: ModelSpec, gpu: Gpu, engine: Engine, work: Workload, gpus: int
) -> list[Layout]:
    """Every layout of so many GPUs: those that fit first, each kind by step time."""
    found = []
    for axes in _axes(gpus):
        tries = [
            examine(recipe, spec, gpu, engine, work, policy) for policy in _variants(recipe, axes)
        ]
        fitting = [layout for layout in tries if layout.fits]
        found.append(min(fitting, key=_seconds) if fitting else min(tries, key=_peak))
    fastest = min(map(_seconds, [layout for layout in found if layout.fits] or found))

    def rank(layout: Layout) -> tuple[Any, ...]:
        time, policy = layout.time, layout.policy
        slower = int((time.total / fastest - 1) / EQUAL) if time else math.inf
        model = policy.ranks // policy.data_parallel
        return not layout.fits, slower, model, policy.context_parallel, _seconds(layout)

    return sorted(found, key=rank)


def _seconds(layout: Layout) -> float:
    return layout.time.total if layout.time else float("inf")


def _peak(layout: Layout) -> float:
    return float(layout.memory.peak) if layout.memory else float("inf")


def _axes(gpus: int) -> Iterator[dict[str, int]]:
    """Sizes of the axes whose product is `gpus`."""
    for tensor in _divisors(gpus):
        for pipeline in _divisors(gpus // tensor):
            for context in _divisors(gpus // tensor // pipeline):
                sizes = (tensor, pipeline, context, gpus // tensor // pipeline // context)
                yield dict(zip(_AXES, sizes, strict=True))


def _variants(recipe: Recipe, axes: dict[str, int]) -> Iterator[Policy]:
    """The recipe's policy in this layout, with each recomputation and length of rows."""
    policy = recipe.policy
    longest = recipe.data.max_prompt_tokens + recipe.longest_response
    settings: dict[str, Any] = {
        **axes,
        "sequence_parallel": axes["tensor_parallel"] > 1,
        "virtual_pipeline": policy.virtual_pipeline if axes["pipeline_parallel"] > 1 else 1,
        "shared_prompts": policy.shared_prompts and axes["context_parallel"] == 1,
    }
    for tokens in sorted({policy.tokens_per_microbatch, longest}, reverse=True):
        for recompute in RECOMPUTE:
            update = {**settings, "recompute": recompute, "tokens_per_microbatch": tokens}
            yield policy.model_copy(update=update)


def _refused(recipe: Recipe, spec: ModelSpec, gpu: Gpu, policy: Policy) -> str:
    """What the model, the batch or the GPU forbids; empty if nothing."""
    try:
        check_layout(policy, spec)
        check_fp8(policy, spec, True, gpu.capability)
    except RecipeError as error:
        return str(error).partition("\n")[0]
    inside = policy.tensor_parallel * policy.context_parallel
    if inside > GPUS_PER_NODE:
        return (
            f"tensor x context parallel: {inside} ranks exchange messages in every layer and "
            f"would span nodes of {GPUS_PER_NODE} GPUs"
        )
    prompts = recipe.rollout.prompts_per_step // recipe.algorithm.minibatches
    fewest = min(s.samples_per_prompt or recipe.rollout.samples_per_prompt for s in recipe.stages)
    items = prompts * (1 if policy.shared_prompts else fewest)
    if items < policy.data_parallel:
        return (
            f"algorithm.minibatches: {items} pieces of work in a minibatch leave some of the "
            f"{policy.data_parallel} data-parallel ranks without any"
        )
    return ""


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
