"""The running parts of a run (ranks, engines, graders, prompts), opened and closed as one."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from prorl_nemo.cluster.check import check_cluster
from prorl_nemo.cluster.placement import reserve
from prorl_nemo.cluster.policy_group import PolicyGroup
from prorl_nemo.data.chat import load_tokenizer
from prorl_nemo.data.prompts import RunPrompts, load_prompts
from prorl_nemo.megatron.layout import read_model_spec
from prorl_nemo.recipe import Recipe
from prorl_nemo.rewards.pool import GraderPool
from prorl_nemo.rewards.sandbox.probe import working_backend
from prorl_nemo.rollout.engine_settings import EngineSettings
from prorl_nemo.rollout.fleet import Fleet
from prorl_nemo.training.batch import TrainingBatch
from prorl_nemo.training.step_metrics import hardware_figures


@dataclass
class Session:
    """Handles of everything that runs."""

    recipe: Recipe
    folder: Path
    policy: PolicyGroup
    fleet: Fleet
    graders: GraderPool
    prompts: RunPrompts
    version: int = 0

    def sync_weights(self, version: int) -> None:
        """The trainer's weights into every engine.

        Raises:
            PolicyError: a trainer rank was lost, or lost another; the engines then lack tensors.
        """
        transfer = self.recipe.rollout.weight_transfer
        again = self.policy.weights if transfer == "broadcast" else None
        self.fleet.update_weights(version, self.policy.weights(transfer), again)
        self.version = version

    def hardware_figures(self, batch: TrainingBatch, seconds: float) -> dict[str, float]:
        """See `step_metrics.hardware_figures`."""
        spec = read_model_spec(self.folder)
        return hardware_figures(spec, batch, seconds, self.policy.resources())

    def verify_weights(self) -> int:
        """Compare every tensor of every engine with the trainer's; returns how many there are.

        Raises:
            FleetError: an engine computes with other weights.
        """
        expected = self.policy.weight_checksums(self.fleet.settings.dtype)
        self.fleet.verify_weights(expected)
        return len(expected)


@contextmanager
def open_session(
    recipe: Recipe,
    folder: Path,
    on_event: Callable[[str, dict[str, Any]], None],
    on_phase: Callable[[str], None] = lambda name: None,
) -> Iterator[Session]:
    """Start Ray (or join the cluster at RAY_ADDRESS) and all actors; stop them at the end."""
    with ExitStack() as stack:
        on_phase("prompts")
        dropped: list[str] = []

        def drop(prompt_id: str, reason: str) -> None:
            dropped.append(prompt_id)
            on_event("prompt_dropped", {"prompt_id": prompt_id, "reason": reason})

        prompts = load_prompts(recipe, load_tokenizer(folder), drop)
        on_phase("graders")
        kinds = sorted({prompt.grading["kind"] for prompt in prompts.validation})
        if "code" in kinds:
            on_event("sandbox", {"name": working_backend(recipe.grading.sandbox).name})
        graders = GraderPool(
            # Graders work while the engines do, so they get half of the cores.
            recipe.grading.workers or max(1, (os.cpu_count() or 2) // 2),
            preload=kinds,
            sandbox=recipe.grading.sandbox,
        )
        stack.callback(graders.close)
        on_phase("Ray")
        if not ray.is_initialized():
            start_ray()
            stack.callback(ray.shutdown)
        on_phase("nodes")
        placement = stack.enter_context(reserve(recipe, folder))
        on_phase("trainer")
        policy = PolicyGroup(recipe, folder, placement)
        stack.callback(policy.shutdown)
        on_phase("engines")
        settings = EngineSettings.from_recipe(
            recipe, folder, placement.local_engines, placement.assignment.gpu
        )

        def engine_event(event: str, details: dict[str, Any]) -> None:
            on_event(event, details)
            if event == "engine_restarted":
                placement.check()  # Where its node is gone, no new engine will start.

        fleet = Fleet(
            settings,
            recipe.rollout.engines,
            actor_options=placement.engine_options(),
            on_event=engine_event,
            hang_seconds=recipe.rollout.engine_hang_seconds,
            max_restarts=recipe.rollout.max_engine_restarts,
            restart_window=recipe.rollout.engine_restart_window,
        )
        stack.callback(fleet.shutdown)
        yield Session(recipe, folder, policy, fleet, graders, prompts)


def check_nodes(recipe: Recipe, console: Console) -> bool:
    """`prorl check --cluster`: join the Ray cluster and look at its nodes; whether all are fit."""
    start_ray()
    try:
        return check_cluster(recipe, console)
    finally:
        ray.shutdown()


def start_ray() -> None:
    """A local Ray, or the cluster that RAY_ADDRESS names. Quiet, without a dashboard."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    # Ray runs its workers at niceness 15: trainer and engines would wait for everything else.
    os.environ.setdefault("RAY_worker_niceness", "0")
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(
        address=os.environ.get("RAY_ADDRESS"),
        include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    # Ray makes SIGTERM end the process at once: a run that Slurm stops would not be saved.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
