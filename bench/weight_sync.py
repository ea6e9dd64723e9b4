"""A policy update on its way into the engines: seconds, against what it cannot go below.

Trainer ranks -> Ray's object store -> engines, for float32 and bfloat16, one and two trainer ranks
(tensor parallel), one and two engines. Beside it, for the same tensors: vLLM's own
`reload_weights` inside as many processes at once as there are engines, which is what the engines
have to do in any case, and a plain copy of the same bytes. Least of several repeats.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from prorl_nemo.cluster.policy_group import PolicyGroup
from prorl_nemo.model_source import resolve_model
from prorl_nemo.recipe import Recipe, load_recipe
from prorl_nemo.rollout.engine import VllmEngine
from prorl_nemo.rollout.engine_settings import EngineSettings
from prorl_nemo.rollout.fleet import Fleet
from prorl_nemo.training.session import start_ray

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
CASES = tuple(itertools.product(("bf16", "fp32"), (1, 2), (1, 2)))
"""(precision, trainer ranks, engines)."""

REPEATS = 15


@ray.remote
class Alone:
    """One engine with the tensors already in its own process."""

    def __init__(self, settings: EngineSettings) -> None:
        self.engine = VllmEngine(settings)
        dtype = getattr(torch, settings.dtype)
        self.tensors = {
            name: tensor.to(dtype)
            for path in sorted(Path(settings.model).glob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }

    def reload(self) -> float:
        return best(lambda: self.engine.update_weights(1, self.tensors.items()))

    def copy(self) -> float:
        targets = [torch.empty_like(tensor) for tensor in self.tensors.values()]

        def copy() -> None:
            for target, tensor in zip(targets, self.tensors.values(), strict=True):
                target.copy_(tensor)

        return best(copy)

    def megabytes(self) -> float:
        return sum(tensor.nbytes for tensor in self.tensors.values()) / 1e6


def best(action: Callable[[], Any]) -> float:
    """Least seconds of a few repeats, after one that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def alone(settings: EngineSettings, engines: int) -> dict[str, float]:
    """What the engines need by themselves, all at the same time."""
    environment: dict[str, Any] = {"env_vars": settings.environment()}
    actors = [
        Alone.options(num_cpus=0, runtime_env=environment).remote(settings) for _ in range(engines)
    ]
    try:
        return {
            "megabytes": ray.get(actors[0].megabytes.remote()),
            "reload_seconds": max(ray.get([actor.reload.remote() for actor in actors])),
            "copy_seconds": ray.get(actors[0].copy.remote()),
        }
    finally:
        for actor in actors:
            ray.kill(actor)


def synced(recipe: Recipe, folder: Path, settings: EngineSettings, engines: int) -> float:
    """Seconds of an update from the trainer's ranks, which is then proved to have arrived."""
    policy, fleet = PolicyGroup(recipe, folder), Fleet(settings, engines)
    try:
        seconds = best(lambda: fleet.update_weights(1, policy.weights()))
        fleet.verify_weights(policy.weight_checksums(settings.dtype))
        return seconds
    finally:
        fleet.shutdown()
        policy.shutdown()


def main(json_path: Path | None) -> None:
    """Run the bench, print its table and write the figures to `json_path`."""
    rows: list[dict[str, Any]] = []
    start_ray()
    try:
        limits: dict[tuple[str, int], dict[str, float]] = {}
        for precision, ranks, engines in CASES:
            recipe = load_recipe(
                RECIPE,
                [
                    f"policy.precision={precision}",
                    f"policy.tensor_parallel={ranks}",
                    f"rollout.engines={engines}",
                ],
            )
            folder = resolve_model(recipe.model)
            settings = EngineSettings.from_recipe(recipe, folder)
            if (precision, engines) not in limits:
                limits[precision, engines] = alone(settings, engines)
            limit, seconds = limits[precision, engines], synced(recipe, folder, settings, engines)
            rows.append(
                {
                    "precision": precision,
                    "ranks": ranks,
                    "engines": engines,
                    **limit,
                    "sync_seconds": seconds,
                    "sync_over_reload": seconds / limit["reload_seconds"],
                    "sync_over_copy": seconds / limit["copy_seconds"],
                }
            )
    finally:
        ray.shutdown()
    table = Table(title=f"weights of {recipe.model} into the engines")
    columns = ("precision", "ranks", "engines", "sync, s", "reload, s", "copy, s", "sync/reload")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["precision"],
            str(row["ranks"]),
            str(row["engines"]),
            f"{row['sync_seconds']:.2f}",
            f"{row['reload_seconds']:.2f}",
            f"{row['copy_seconds']:.3f}",
            f"{row['sync_over_reload']:.2f}",
        )
    Console().print(table)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(rows, indent=1) + "\n")
