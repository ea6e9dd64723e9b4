"""The run directory: of one recipe, and of one process at a time.

Our choice: the resolved recipe is kept in it and compared on every start, because
a run that goes on with other settings than it began with is no experiment; and it
is locked, because two processes would overwrite each other's checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prorl_nemo import folder_lock
from prorl_nemo.errors import UserError
from prorl_nemo.recipe import Recipe
from prorl_nemo.recipe_pretrain import Pretraining
from prorl_nemo.settings_file import changed_keys, load_settings
from prorl_nemo.strict_yaml import dump_yaml
from prorl_nemo.training.metrics import replace_file

# Settings that may differ on resume: they change where and how fast, not what is computed.
# (max_skipped_updates, faults and checkpoint decide when a run ends or saves, not its steps.)
RESUMABLE = (
    "runs_dir",
    "policy.tensor_parallel",
    "policy.sequence_parallel",
    "policy.pipeline_parallel",
    "policy.virtual_pipeline",
    "policy.context_parallel",
    "policy.data_parallel",
    "policy.threads",
    "policy.tokens_per_microbatch",
    "policy.shared_prompts",
    "policy.recompute",
    "policy.attention",
    "grading.workers",
    "grading.sandbox",
    "grading.allow_unsafe",
    "rollout.engines",
    "rollout.engine_threads",
    "rollout.kv_cache_mib",
    "rollout.gpu_memory_share",
    "rollout.sleep_in_updates",
    "rollout.max_rejected_per_kept",
    "rollout.weight_transfer",
    "rollout.verify_weights_every",
    "rollout.engine_hang_seconds",
    "rollout.max_engine_restarts",
    "rollout.engine_restart_window",
    "checkpoint.interval",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "checkpoint.keep_best",
    "checkpoint.background",
    "policy.optimizer.max_skipped_updates",
    "faults.max_restarts",
    "faults.silent_seconds",
    "faults.collective_seconds",
    "faults.stop_seconds",
    "faults.wall_clock_hours",
    "tracking.backends",
    "tracking.project",
    "tracking.offline",
)


@contextmanager
def open_run_dir(recipe: Recipe | Pretraining) -> Iterator[dict[str, list[Any]]]:
    """The run directory, made if need be and held until the end.

    Yields:
        settings that changed since the run began, {key: [before, now]}; all of them RESUMABLE.

    Raises:
        UserError: not writable, in use by another process, or begun with another recipe.
    """
    run_dir = recipe.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / "lock").open("a+")
    except OSError as error:
        raise _unwritable(run_dir, error) from None
    with lock:
        try:
            folder_lock.take(
                lock,
                f"name: {run_dir}",
                "wait for its end, stop it, or give this run another name with name=NAME",
            )
        except OSError as error:
            raise UserError(
                f"runs_dir: the file system of {run_dir} cannot lock files ({error.strerror}), so "
                "two processes could ruin one run; choose another with runs_dir=DIR"
            ) from None
        try:
            folder_lock.sign(lock)
            changes = changes_since(recipe)
            if changes is None:
                resolved = dump_yaml(recipe.model_dump(mode="json"))
                replace_file(run_dir / "recipe.yaml", [resolved.encode()])
        except OSError as error:
            raise _unwritable(run_dir, error) from None
        yield changes or {}


def changes_since(recipe: Recipe | Pretraining) -> dict[str, list[Any]] | None:
    """Settings that changed since the run began, all of them RESUMABLE; None: it has not begun.

    A directory without figures yet belongs to nobody.

    Raises:
        UserError: begun with another recipe.
    """
    run_dir = recipe.run_dir
    path, figures = run_dir / "recipe.yaml", run_dir / "metrics.jsonl"
    resolved = recipe.model_dump(mode="json")
    begun = any((run_dir / "checkpoints").glob("step_*")) or (
        figures.exists() and figures.stat().st_size > 0
    )
    if not begun or not path.exists():
        return None
    changes = changed_keys(load_settings(type(recipe), path).model_dump(mode="json"), resolved)
    refused = {key: pair for key, pair in changes.items() if key not in RESUMABLE}
    if refused:
        lines = [f"{key}: {old!r} there, {new!r} now" for key, (old, new) in refused.items()]
        more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise UserError(
            f"name: {run_dir} was begun with another recipe; give this run another name with "
            "name=NAME, or delete that folder\n  " + "\n  ".join(lines[:10] + more)
        )
    return changes


def _unwritable(run_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"runs_dir: {run_dir} cannot be written ({error.strerror}); choose another with "
        "runs_dir=DIR"
    )
