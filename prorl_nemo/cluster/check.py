"""`prorl check --cluster`: every node of the Ray cluster looked at, and the network between."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.table import Table

from prorl_nemo.cluster.bandwidth import Bandwidths, measure
from prorl_nemo.cluster.placement import (
    ClusterError,
    Node,
    answering,
    assign,
    canary,
    cluster_nodes,
)
from prorl_nemo.cluster.probes import GIB, Needs, Probe, probe, problems
from prorl_nemo.recipe import Recipe

_SECONDS = 120.0


def check_cluster(recipe: Recipe, console: Console) -> bool:
    """Print what each node shows and what is wrong; whether nothing is.

    Joins the cluster at RAY_ADDRESS, or looks at this machine alone.

    Raises:
        ClusterError: the recipe's layout does not fit on these nodes.
    """
    nodes = cluster_nodes()
    with canary(recipe.run_dir.parent) as file:
        seen = answering([node.id for node in nodes], [str(file)])
    rollout, answered = recipe.rollout, [node for node in nodes if node.id in seen]
    assign(answered, recipe.policy, rollout.engines, rollout.tensor_parallel)
    found = [
        f"{node.host}: runs no task; is its Ray alive?" for node in nodes if node.id not in seen
    ]
    found += [
        f"{node.host}: does not see {file.parent}; runs_dir must be on a shared file system"
        for node in nodes
        if seen.get(node.id)
    ]
    try:
        probes = _probes(answered, recipe.grading.sandbox)
    except RayError as error:
        raise ClusterError(f"RAY_ADDRESS: a node could not be looked at: {_first(error)}") from None
    code = any(source.domain == "code" for source in recipe.data.sources)
    needs = Needs(gpus=max(node.gpus for node in nodes), disk=GIB, memory=GIB, sandbox=code)
    found += problems(probes, needs)
    try:
        speeds = measure(answered, gpu=all(len(p.gpus) >= needs.gpus > 0 for p in probes))
    except RayError as error:
        speeds = Bandwidths([], None)
        found.append(
            f"the network between the nodes could not be measured: {_first(error)}; look at "
            "firewalls, and name the interface to use (PRORL_INTERFACE, NCCL_SOCKET_IFNAME)"
        )
    for index in speeds.slow_links():
        target = probes[(index + 1) % len(probes)].host
        found.append(
            f"{probes[index].host}: {_gigabytes(speeds.to_next[index])} to {target}, less than "
            "half of the usual; look at its network cards, or leave it out with --exclude"
        )
    console.print(_table(probes, speeds))
    if speeds.all_reduce is not None:
        console.print(f"all-reduce over all: {_gigabytes(speeds.all_reduce)} (bus bandwidth)")
    for problem in found:
        console.print(problem, style="red", soft_wrap=True, highlight=False, markup=False)
    if not found:
        console.print(f"{len(probes)} nodes are fit for {recipe.name}", markup=False)
    return not found


@ray.remote
def _probe(sandbox: str) -> Probe:
    return probe(Path(os.environ.get("TMPDIR", tempfile.gettempdir())), sandbox)


def _probes(nodes: Sequence[Node], sandbox: str) -> list[Probe]:
    tasks = [
        _probe.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
        ).remote(sandbox)
        for node in nodes
    ]
    probes: list[Probe] = ray.get(tasks, timeout=_SECONDS)
    return probes


def _first(error: RayError) -> str:
    """A line about what Ray says in many."""
    if isinstance(error, GetTimeoutError):
        return "no answer in time"
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {cause}".partition("\n")[0]


def _table(probes: Sequence[Probe], speeds: Bandwidths) -> Table:
    table = Table()
    for name in ("node", "GPUs", "CPUs", "memory", "/dev/shm", "disk", "sandbox", "to next"):
        table.add_column(name, justify="left" if name in ("node", "sandbox") else "right")
    for index, node in enumerate(probes):
        free = [f"{value / GIB:.0f} GiB" for value in (node.memory, node.shm, node.disk)]
        speed = _gigabytes(speeds.to_next[index]) if speeds.to_next else ""
        gpus = f"{len(node.gpus)} {node.gpus[0]}" if node.gpus else "0"
        table.add_row(node.host, gpus, str(node.cpus), *free, node.sandbox or "none", speed)
    return table


def _gigabytes(speed: float) -> str:
    return f"{speed / 1e9:.2f} GB/s"
