"""What this machine and this model cannot do, said before a worker starts.

Precision, context, memory and disk are looked at here, the layout in
`megatron.layout`, the recipe itself in `recipe`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from prorl_nemo.errors import RecipeError
from prorl_nemo.megatron.layout import ModelSpec, check_layout, read_model_spec
from prorl_nemo.recipe import Recipe
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
    _check_precision(recipe)
    _check_context(recipe, spec)
    _check_memory(recipe, spec)
    _check_disk(recipe, spec)
    return spec


def _check_precision(recipe: Recipe) -> None:
    if recipe.policy.fp8 is None:
        return
    if importlib.util.find_spec("transformer_engine") is None:
        raise RecipeError(
            "policy.fp8: needs Transformer Engine, which is not installed; remove the key or use "
            "the GPU container"
        )
    raise RecipeError("policy.fp8: this version computes in bf16 or fp32; remove the key")


def _check_context(recipe: Recipe, spec: ModelSpec) -> None:
    limits = [s.max_response_tokens or recipe.rollout.max_response_tokens for s in recipe.stages]
    context = recipe.data.max_prompt_tokens + max(limits)
    if context > spec.max_positions:
        raise RecipeError(
            f"data.max_prompt_tokens + rollout.max_response_tokens: {context} tokens exceed the "
            f"model's {spec.max_positions} positions; lower one of them"
        )


def required_bytes(recipe: Recipe, spec: ModelSpec) -> int:
    """Host memory of a CPU run: weights, gradients, Adam, reference, engines, processes."""
    weight = _weight_bytes(recipe.policy.precision)
    engine_weight = _weight_bytes(recipe.rollout.precision or recipe.policy.precision)
    # Per parameter: weight, a copy while the reference is swapped in, the reference, the fp32
    # gradient, and in the distributed optimizer two fp32 moments (and fp32 weights for bf16).
    replicated = (3 * weight + 4) * recipe.policy.data_parallel
    sharded = 8 + (4 if weight == 2 else 0)
    # An engine holds its weights twice while it loads them, and the last buckets are kept.
    engines = (2 * recipe.rollout.engines + 1) * engine_weight
    cache = (recipe.rollout.kv_cache_mib or _KV_CACHE_MIB) * recipe.rollout.engines << 20
    processes = (recipe.policy.ranks + recipe.rollout.engines + 1) * _PROCESS_BYTES
    return spec.parameters * (replicated + sharded + engines) + cache + processes


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
    written = -(-recipe.total_steps // recipe.checkpoint.interval)
    # While one is written, those to keep are there still.
    most = min(written, recipe.checkpoint.keep_last + 1)
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
