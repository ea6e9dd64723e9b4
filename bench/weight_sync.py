"""A policy update on its way into the engines: seconds, against what it cannot go below.

Trainer ranks -> memory file -> engines, for float32 and bfloat16, one and two trainer ranks (tensor
parallel), one and two engines, and an engine of three workers (the model has nine heads). Beside
it, for the same tensors: vLLM's own `reload_weights` inside as many processes at once as there are
engines, which is what the engines have to do in any case, and a plain copy of the same bytes.
Update and reload take turns, so that both meet the machine in the same mood; least and median of
the repeats.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
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
CASES = (*itertools.product(("bf16", "fp32"), (1, 2), (1, 2), (1,)), ("bf16", 1, 1, 3))
"""(precision, trainer ranks, engines, workers of an engine)."""

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
        self.targets = [torch.empty_like(tensor) for tensor in self.tensors.values()]

    def reload(self) -> float:
        return seconds_of(lambda: self.engine.update_weights(1, self.tensors.items()))

    def copy(self) -> float:
        def copy() -> None:
            for target, tensor in zip(self.targets, self.tensors.values(), strict=True):
                target.copy_(tensor)

        return seconds_of(copy)

    def megabytes(self) -> float:
        return sum(tensor.nbytes for tensor in self.tensors.values()) / 1e6


def seconds_of(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measured(recipe: Recipe, folder: Path, settings: EngineSettings) -> dict[str, float]:
    """Seconds of an update, which is then proved to have arrived, of reload and of copy."""
    engines, whole = recipe.rollout.engines, replace(settings, tensor_parallel=1)
    environment: dict[str, Any] = {"env_vars": whole.environment()}
    alone = [
        Alone.options(num_cpus=0, runtime_env=environment).remote(whole) for _ in range(engines)
    ]
    policy, fleet = PolicyGroup(recipe, folder), Fleet(settings, engines)
    times: dict[str, list[float]] = {"sync": [], "reload": [], "copy": []}
    try:
        megabytes = ray.get(alone[0].megabytes.remote())
        for _ in range(REPEATS + 2):
            times["sync"].append(seconds_of(lambda: fleet.update_weights(1, policy.weights())))
            times["reload"].append(max(ray.get([actor.reload.remote() for actor in alone])))
            times["copy"].append(ray.get(alone[0].copy.remote()))
        fleet.verify_weights(policy.weight_checksums(settings.dtype))
    finally:
        fleet.shutdown()
        policy.shutdown()
        for actor in alone:
            ray.kill(actor)
    # The first two warm up: pages are touched for the first time.
    kept = {name: found[2:] for name, found in times.items()}
    least = {name: min(found) for name, found in kept.items()}
    pairs = zip(kept["sync"], kept["reload"], strict=True)
    return {
        "megabytes": megabytes,
        **{f"{name}_seconds": seconds for name, seconds in least.items()},
        "sync_over_reload": least["sync"] / least["reload"],
        "sync_over_reload_median": statistics.median(sync / reload for sync, reload in pairs),
        "sync_over_copy": least["sync"] / least["copy"],
    }


def main(json_path: Path | None) -> None:
    """Run the bench, print its table and write the figures to `json_path`."""
    rows: list[dict[str, Any]] = []
    start_ray()
    try:
        for precision, ranks, engines, workers in CASES:
            recipe = load_recipe(
                RECIPE,
                [
                    f"policy.precision={precision}",
                    f"policy.tensor_parallel={ranks}",
                    f"rollout.engines={engines}",
                    f"rollout.tensor_parallel={workers}",
                ],
            )
            folder = resolve_model(recipe.model)
            settings = EngineSettings.from_recipe(recipe, folder)
            found = measured(recipe, folder, settings)
            case = {"precision": precision, "ranks": ranks, "engines": engines}
            rows.append({**case, "workers": workers, **found})
    finally:
        ray.shutdown()
    table = Table(title=f"weights of {recipe.model} into the engines")
    names = ("precision", "ranks", "engines", "workers", "sync, s", "reload, s", "copy, s", "ratio")
    for column in (*names, "median ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["precision"],
            str(row["ranks"]),
            str(row["engines"]),
            str(row["workers"]),
            f"{row['sync_seconds']:.2f}",
            f"{row['reload_seconds']:.2f}",
            f"{row['copy_seconds']:.3f}",
            f"{row['sync_over_reload']:.2f}",
            f"{row['sync_over_reload_median']:.2f}",
        )
    Console().print(table)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(rows, indent=1) + "\n")
