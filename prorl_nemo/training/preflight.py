"""What this machine and this model cannot do, said before a worker starts.

Precision, context, memory and disk are looked at here, the layout in
`megatron.layout`, the recipe itself in `recipe`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from prorl_nemo.errors import RecipeError
from prorl_nemo.megatron.layout import ModelSpec, check_layout, read_model_spec
from prorl_nemo.megatron.precision import (
    check_attention,
    check_fp8,
    gpu_capability,
    transformer_engine_installed,
)
from prorl_nemo.recipe import Recipe
from prorl_nemo.rollout.engine_split import split_problem
from prorl_nemo.training.host_memory import available_bytes

# Beyond the model: Python, torch, Ray and vLLM of each process (measured: 0.7 to 1.1 GiB).
_PROCESS_BYTES = 1 << 30
_KV_CACHE_MIB = 512  # of an engine on CPU when the recipe does not say


def check_resources(recipe: Recipe, folder: Path) -> ModelSpec:
    """Refuse what this machine or model cannot do. Takes well under a second.

    Raises:
        RecipeError, ModelError: naming the key and the fix.
    """
    spec = read_model_spec(folder)
    check_layout(recipe.policy, spec)
    if "RAY_ADDRESS" not in os.environ:  # Of a cluster's machines each rank checks its own.
        capability = gpu_capability()
        check_attention(recipe.policy, capability)
        check_fp8(recipe.policy, spec, transformer_engine_installed(), capability)
    _check_engine_split(recipe, spec)
    _check_transfer(recipe)
    _check_context(recipe, spec)
    _check_memory(recipe, spec)
    _check_disk(recipe, spec)
    return spec


def _check_engine_split(recipe: Recipe, spec: ModelSpec) -> None:
    problem = split_problem(
        recipe.rollout.tensor_parallel,
        heads=spec.heads,
        kv_heads=spec.groups,
        ffn=spec.ffn,
        vocab=spec.vocab,
    )
    if problem:
        raise RecipeError(f"rollout.tensor_parallel: {problem}")


def _check_transfer(recipe: Recipe) -> None:
    if recipe.rollout.weight_transfer == "cuda_ipc" and not gpu_present():
        raise RecipeError(
            "rollout.weight_transfer: cuda_ipc needs a GPU, and there is none; use host"
        )


def _check_context(recipe: Recipe, spec: ModelSpec) -> None:
    context = recipe.data.max_prompt_tokens + recipe.longest_response
    if context > spec.max_positions:
        raise RecipeError(
            f"data.max_prompt_tokens + rollout.max_response_tokens: {context} tokens exceed the "
            f"model's {spec.max_positions} positions; lower one of them"
        )


def required_bytes(recipe: Recipe, spec: ModelSpec) -> int:
    """Host memory of a CPU run: weights, gradients, Adam, reference, engines, processes."""
    weight = _weight_bytes(recipe.policy.precision)
    engine_weight = _weight_bytes(recipe.rollout.precision or recipe.policy.precision)
    # Per parameter: weight, reference, the fp32 gradient, and in the distributed optimizer two
    # moments (and fp32 weights for bf16).
    replicated = (2 * weight + 4) * recipe.policy.data_parallel
    moments = 2 * _weight_bytes(recipe.policy.optimizer.moments)
    sharded = moments + (4 if weight == 2 else 0)
    # An engine holds its weights twice while it loads them, and the last buckets are kept.
    engines = (2 * recipe.rollout.engines + 1) * engine_weight
    cache = (recipe.rollout.kv_cache_mib or _KV_CACHE_MIB) * recipe.rollout.engines << 20
    workers = recipe.rollout.tensor_parallel
    each = workers + 1 if workers > 1 else 1  # An engine's own process, and its workers'.
    processes = (recipe.policy.ranks + recipe.rollout.engines * each + 1) * _PROCESS_BYTES
    # The copy of weights, reference and optimizer that a checkpoint is written from, beside a step
    # where that goes on meanwhile; otherwise in the room that the step's activations leave.
    copies = (2 * weight + 12) * recipe.policy.data_parallel if recipe.checkpoint.background else 0
    return spec.parameters * (replicated + sharded + engines + copies) + cache + processes


def checkpoint_bytes(recipe: Recipe, spec: ModelSpec) -> int:
    """Disk of one checkpoint: policy and reference, and in fp32 main weights and two moments."""
    return spec.parameters * (2 * _weight_bytes(recipe.policy.precision) + 12)


def _weight_bytes(precision: str) -> int:
    return 2 if precision == "bf16" else 4


def gpu_present() -> bool:
    """Whether this machine has an NVIDIA GPU. Does not import torch, which takes seconds."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _check_memory(recipe: Recipe, spec: ModelSpec) -> None:
    if gpu_present():
        return
    needed, available = required_bytes(recipe, spec), available_bytes()
    if needed > available:
        raise RecipeError(
            f"model: about {needed / 2**30:.1f} GiB of memory are needed for "
            f"{spec.parameters / 1e6:.0f}M parameters, {available / 2**30:.1f} GiB are free; use a "
            "smaller model, fewer rollout.engines or a smaller policy.data_parallel"
        )


def _check_disk(recipe: Recipe, spec: ModelSpec) -> None:
    """A full disk would end the run at a checkpoint, hours from here."""
    saving = recipe.checkpoint
    often = saving.interval
    if saving.keep_best:  # Each validation may be a new best, which is saved as well.
        often = min(often, recipe.validation.interval)
    written = -(-recipe.total_steps // often)
    # While one is written, those to keep are there still; the best may be one of its own.
    kept = saving.keep_last + saving.keep_best
    every = saving.keep_every
    most = min(written, kept + 1 + (recipe.total_steps // every if every else 0))
    there = len(list((recipe.run_dir / "checkpoints").glob("step_*")))
    needed = max(0, most - there) * checkpoint_bytes(recipe, spec)
    # os.path, because Path.is_dir raises where a parent may not be read.
    folder = next(f for f in recipe.run_dir.absolute().parents if os.path.isdir(f))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RecipeError(
            f"checkpoint.keep_last: about {needed / 2**30:.1f} GiB of disk are needed for "
            f"{most - there} checkpoints, {free / 2**30:.1f} GiB are free in {folder}; keep fewer, "
            "or choose another disk with runs_dir=DIR"
        )
