"""The running parts of a run (ranks, engines, graders, prompts), opened and closed as one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from prorl_nemo.cluster.policy_group import PolicyGroup
from prorl_nemo.data.chat import load_tokenizer
from prorl_nemo.data.prompts import RunPrompts, load_prompts
from prorl_nemo.recipe import Recipe
from prorl_nemo.rewards.pool import GraderPool
from prorl_nemo.rollout.engine import EngineSettings
from prorl_nemo.rollout.fleet import Fleet


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
        """The trainer's weights into every engine."""
        self.fleet.update_weights(version, self.policy.weights())
        self.version = version


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
        # Graders work while the engines do, so they get the cores but never more workers.
        graders = GraderPool(max(1, (os.cpu_count() or 2) // 2), preload=kinds)
        stack.callback(graders.close)
        on_phase("Ray")
        if not ray.is_initialized():
            start_ray()
            stack.callback(ray.shutdown)
        on_phase("trainer")
        policy = PolicyGroup(recipe, folder)
        stack.callback(policy.shutdown)
        on_phase("engines")
        settings = EngineSettings.from_recipe(recipe, folder)
        fleet = Fleet(settings, recipe.rollout.engines, on_event=on_event)
        stack.callback(fleet.shutdown)
        yield Session(recipe, folder, policy, fleet, graders, prompts)


def start_ray() -> None:
    """A local Ray, or the cluster that RAY_ADDRESS names. Quiet, without a dashboard."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    # Ray runs its workers at niceness 15: trainer and engines would wait for everything else.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address=os.environ.get("RAY_ADDRESS"),
        include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
