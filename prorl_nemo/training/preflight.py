"""Everything that can be refused before a worker starts: layout, precision, memory, run directory."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import psutil
import yaml

from prorl_nemo.errors import RecipeError, UserError
from prorl_nemo.megatron.layout import ModelSpec, check_layout, read_model_spec
from prorl_nemo.recipe import Recipe, parse_recipe

# Settings that may differ on resume: they change where and how fast, not what is computed.
RESUMABLE = (
    "runs_dir",
    "policy.tensor_parallel",
    "policy.pipeline_parallel",
    "policy.data_parallel",
    "policy.threads",
    "policy.tokens_per_microbatch",
    "policy.shared_prompts",
    "policy.recompute",
    "rollout.engines",
    "rollout.engine_threads",
    "rollout.kv_cache_mib",
    "rollout.gpu_memory_share",
    "rollout.max_rejected_per_kept",
    "checkpoint.interval",
    "checkpoint.keep_last",
)

# Beyond the model: Python, torch, Ray and vLLM of each process (measured: 0.7 to 1.1 GiB).
_PROCESS_BYTES = 1 << 30


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
    weight = 2 if recipe.policy.precision == "bf16" else 4
    engine_weight = 2 if (recipe.rollout.precision or recipe.policy.precision) == "bf16" else 4
    # Per parameter: weight, a copy while the reference is swapped in, the reference, the fp32
    # gradient, and in the distributed optimizer two fp32 moments (and fp32 weights for bf16).
    replicated = (3 * weight + 4) * recipe.policy.data_parallel
    sharded = 8 + (4 if weight == 2 else 0)
    # An engine holds its weights twice while it loads them, and the last buckets are kept.
    engines = (2 * recipe.rollout.engines + 1) * engine_weight
    cache = (recipe.rollout.kv_cache_mib or 512) * recipe.rollout.engines << 20
    processes = (recipe.policy.ranks + recipe.rollout.engines + 1) * _PROCESS_BYTES
    return spec.parameters * (replicated + sharded + engines) + cache + processes


def _check_memory(recipe: Recipe, spec: ModelSpec) -> None:
    if importlib.util.find_spec("torch.cuda") and _gpu_present():
        return
    needed, available = required_bytes(recipe, spec), psutil.virtual_memory().available
    if needed > available:
        raise RecipeError(
            f"model: about {needed / 2**30:.1f} GiB of memory are needed for "
            f"{spec.parameters / 1e6:.0f}M parameters, {available / 2**30:.1f} GiB are free; use a "
            "smaller model, fewer rollout.engines or a smaller policy.data_parallel"
        )


def _gpu_present() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def prepare_run_dir(recipe: Recipe) -> dict[str, Any]:
    """Make the run directory, or check that it belongs to this recipe.

    Returns:
        settings that changed since the run began, {key: [before, now]}; all of them RESUMABLE.

    Raises:
        UserError: not writable, or begun with another recipe.
    """
    run_dir = recipe.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"runs_dir: {run_dir} cannot be written ({error.strerror}); choose another with "
            "runs_dir=DIR"
        ) from None
    path = run_dir / "recipe.yaml"
    resolved = recipe.model_dump(mode="json")
    if not path.exists():
        path.write_text(yaml.safe_dump(resolved, sort_keys=False))
        return {}
    before = parse_recipe(yaml.safe_load(path.read_text()), str(path)).model_dump(mode="json")
    changes = differences(before, resolved)
    refused = {key: pair for key, pair in changes.items() if key not in RESUMABLE}
    if refused:
        lines = [f"{key}: {old!r} there, {new!r} now" for key, (old, new) in refused.items()]
        raise UserError(
            f"name: {run_dir} was begun with another recipe; give this one another name, or "
            "delete that folder\n  " + "\n  ".join(lines[:10])
        )
    return changes


def differences(before: Any, now: Any, prefix: str = "") -> dict[str, list[Any]]:
    """Keys whose values differ, as {dotted key: [before, now]}; lists are compared whole."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return {} if before == now else {prefix: [before, now]}
    found: dict[str, list[Any]] = {}
    for key in [*before, *(k for k in now if k not in before)]:
        name = f"{prefix}.{key}" if prefix else key
        found |= differences(before.get(key), now.get(key), name)
    return found
