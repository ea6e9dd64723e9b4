"""Which node each trainer rank and each engine runs on, and the reservation that keeps it there.

Our choice: the nodes are chosen here, by a pure function (`assign`), and Ray's placement group only
holds what was chosen. On GPU nodes a bundle is one GPU, which a rank and an engine share, or one of
the GPUs of an engine; on CPU nodes it is the node. Ranks that exchange messages in every layer are
neighbours on one node.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from prorl_nemo.errors import UserError
from prorl_nemo.recipe import Policy, Recipe

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 45.0
"""A node that runs no task for so long is lost. Longer than Ray needs to start a process there."""
RESERVE_SECONDS = 60.0
"""How long another run on the same Ray cluster may take to give its GPUs back."""


class ClusterError(UserError):
    """The Ray cluster lacks what the recipe asks for."""


class NodeLost(RuntimeError):
    """A node of the run is gone: start again on those that are left."""


@dataclass(frozen=True)
class Node:
    """A machine of the Ray cluster: Ray's id of it, its address, its GPUs."""

    id: str
    host: str
    gpus: int


@dataclass(frozen=True)
class Assignment:
    """Where everything runs.

    Attributes:
        bundles: node id of each bundle.
        gpu: whether a bundle is a GPU; else it is a node.
        ranks: bundle of each.
        engines: bundles of each; one, or the GPUs that share its matrices.
    """

    bundles: tuple[str, ...]
    gpu: bool
    ranks: tuple[int, ...]
    engines: tuple[tuple[int, ...], ...]

    def node(self, bundle: int) -> str:
        return self.bundles[bundle]

    def neighbours(self, bundles: Sequence[int], bundle: int) -> int:
        """How many of `bundles` (of all ranks, or one of each engine) are on one bundle's node."""
        return sum(self.bundles[other] == self.bundles[bundle] for other in bundles)

    @property
    def one_machine(self) -> bool:
        """Whether all ranks and engines share a node, and so its memory."""
        used = {*self.ranks, *(bundle for engine in self.engines for bundle in engine)}
        return len({self.node(bundle) for bundle in used}) == 1

    def gpu_share(self, bundle: int) -> float:
        """Of a bundle's GPU, for each process in it."""
        users = self.ranks.count(bundle) + sum(bundle in engine for engine in self.engines)
        return 1.0 / users if self.gpu else 0.0


def assign(
    nodes: Sequence[Node], policy: Policy, engines: int, tensor_parallel: int = 1
) -> Assignment:
    """Ranks in order over the nodes, whole groups on a node; engines beside them, evenly.

    Args:
        tensor_parallel: GPUs of one node that an engine has.

    Raises:
        ClusterError: there are too few GPUs, or no node holds a tensor-parallel group.
    """
    with_gpus = [node for node in nodes if node.gpus]
    if with_gpus:
        return _on_gpus(with_gpus, policy, engines, tensor_parallel)
    if not nodes:
        raise ClusterError("RAY_ADDRESS: the Ray cluster has no node that answers")
    groups = policy.ranks // policy.tensor_parallel
    ranks = [
        group * len(nodes) // max(groups, len(nodes))
        for group in range(groups)
        for _ in range(policy.tensor_parallel)
    ]
    spread = [(engine * len(nodes) // max(engines, len(nodes)),) for engine in range(engines)]
    return Assignment(tuple(n.id for n in nodes), False, tuple(ranks), tuple(spread))


def _on_gpus(nodes: Sequence[Node], policy: Policy, engines: int, split: int) -> Assignment:
    tensor, inner = policy.tensor_parallel, policy.tensor_parallel * policy.context_parallel
    largest = max(node.gpus for node in nodes)
    if tensor > largest:
        raise ClusterError(
            f"policy.tensor_parallel: {tensor} ranks exchange messages in every layer and must be "
            f"on one node, the largest has {largest} GPUs; use at most {largest}"
        )
    if split > largest:
        raise ClusterError(
            f"rollout.tensor_parallel: the {split} GPUs of an engine must be on one node, the "
            f"largest has {largest}; use at most {largest}"
        )
    unit = inner if inner <= largest else tensor
    ranks: list[_Place] = []
    beside: list[list[_Place]] = []
    free: list[list[_Place]] = []
    for node in nodes:
        whole = min(node.gpus // unit * unit, policy.ranks - len(ranks))
        places = [_Place(node.id, gpu) for gpu in range(node.gpus)]
        ranks += places[:whole]
        for start in range(0, node.gpus - split + 1, split):
            (beside if start < whole else free).append(places[start : start + split])
    if len(ranks) < policy.ranks or len(beside) + len(free) < engines:
        there = ", ".join(f"{node.host} {node.gpus}" for node in nodes)
        groups = f" in groups of {unit} on a node" if unit > 1 else ""
        several = f" of {split} on a node" if split > 1 else ""
        raise ClusterError(
            f"policy.data_parallel: {policy.ranks} trainer ranks{groups} and {engines} "
            f"engines{several} need {max(policy.ranks, engines * split)} GPUs; the Ray cluster has "
            f"{there}. Use a smaller layout, fewer rollout.engines, or more nodes"
        )
    near = min(engines, len(beside))
    chosen = [beside[engine * len(beside) // near] for engine in range(near)]
    chosen += free[: engines - near]
    numbers = {place: bundle for bundle, place in enumerate(ranks)}
    for place in (place for engine in chosen for place in engine):
        numbers.setdefault(place, len(numbers))
    return Assignment(
        tuple(place.node for place in numbers),
        True,
        tuple(range(len(ranks))),
        tuple(tuple(numbers[place] for place in engine) for engine in chosen),
    )


def check_transfer(assignment: Assignment, policy: Policy, transfer: str) -> None:
    """Refuse a way of the weights to the engines that the GPUs of the run do not allow.

    NCCL admits a GPU to a process group once, and an engine maps memory of no GPU but its own.

    Raises:
        ClusterError: naming the key.
    """
    if not assignment.gpu:
        return
    # The first rank of each pipeline stage sends.
    stage = policy.ranks // policy.pipeline_parallel
    senders = {assignment.ranks[rank] for rank in range(0, policy.ranks, stage)}
    if transfer == "broadcast" and any(senders & set(engine) for engine in assignment.engines):
        raise ClusterError(
            "rollout.weight_transfer: broadcast needs engines on other GPUs than the trainer rank "
            "that sends, and here they share one; use host"
        )
    if transfer == "cuda_ipc" and not all(senders <= set(e) for e in assignment.engines):
        raise ClusterError(
            "rollout.weight_transfer: cuda_ipc needs every engine on the GPU of the trainer rank "
            f"that sends, and here are {len(assignment.engines)} engines and {len(senders)} such "
            "ranks; use host"
        )


class _Place(NamedTuple):
    """A GPU, by a number of its node that only tells it from the others."""

    node: str
    gpu: int


class Placement:
    """An assignment that Ray holds.

    Args:
        hosts: address of each node by its id.
    """

    def __init__(self, assignment: Assignment, group: Any, hosts: dict[str, str]) -> None:
        self.assignment, self._group, self._hosts = assignment, group, hosts

    def rank_options(self, rank: int) -> dict[str, Any]:
        """Ray options of a trainer rank's actor."""
        return self._options(self.assignment.ranks[rank])

    def engine_options(self) -> list[dict[str, Any]]:
        """What `fleet.Fleet` is to start each engine's actor with.

        Ray puts an actor into one bundle and gives it no share of several GPUs. So an engine with
        several is put into its first bundle and told the GPUs of all; the group holds them.
        """
        options = [self._options(bundles[0]) for bundles in self.assignment.engines]
        for engine, bundles in zip(options, self.assignment.engines, strict=True):
            if len(bundles) > 1:
                tasks = [_device.options(**self._options(b)).remote() for b in bundles]
                engine["num_gpus"] = 0
                engine["environment"] = {
                    "CUDA_VISIBLE_DEVICES": ",".join(_answers(tasks)),
                    # Without it Ray hides all GPUs from an actor that asks for none.
                    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
                }
        return options

    def local_ranks(self, rank: int) -> int:
        """Trainer ranks on this rank's node."""
        assignment = self.assignment
        return assignment.neighbours(assignment.ranks, assignment.ranks[rank])

    @property
    def local_engines(self) -> int:
        """Engines on the node that has most."""
        firsts = [bundles[0] for bundles in self.assignment.engines]
        return max(self.assignment.neighbours(firsts, bundle) for bundle in firsts)

    def check(self) -> None:
        """Raises NodeLost if a node of the run answers no more."""
        lost = set(self._hosts) - set(answering(self._hosts))
        if lost:
            raise NodeLost(f"lost node {', '.join(sorted(self._hosts[node] for node in lost))}")

    def _options(self, bundle: int) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(self._group, bundle)
        return {
            "num_cpus": 0,
            "num_gpus": self.assignment.gpu_share(bundle),
            "scheduling_strategy": strategy,
        }


@contextmanager
def reserve(recipe: Recipe, model: Path) -> Iterator[Placement]:
    """Nodes and GPUs for all ranks and engines of a run, until the block ends.

    Args:
        model: its folder, which every node must see, as it must see the run's.

    Raises:
        ClusterError: too few GPUs, all of them taken, a way of the weights that they do not allow,
            or a folder that a node does not see.
    """
    known = cluster_nodes()
    if len(known) == 1:
        seen: dict[str, list[str]] = {known[0].id: []}
    else:
        with canary(recipe.run_dir.parent) as file:
            seen = answering([n.id for n in known], [str(model / "config.json"), str(file)])
    rollout, there = recipe.rollout, [n for n in known if n.id in seen]
    assignment = assign(there, recipe.policy, rollout.engines, rollout.tensor_parallel)
    check_transfer(assignment, recipe.policy, rollout.weight_transfer)
    used = set(assignment.bundles)
    hosts = {node.id: node.host for node in known if node.id in used}
    blind = {hosts[node]: missing for node, missing in seen.items() if node in used and missing}
    if blind:
        lines = "\n  ".join(f"{host}: {', '.join(missing)}" for host, missing in blind.items())
        raise ClusterError(
            "runs_dir, model: some nodes do not see these files; put run and model where all nodes "
            f"find them\n  {lines}"
        )
    resources = {"GPU": 1.0} if assignment.gpu else {"CPU": 0.01}
    group = placement_group(
        [dict(resources) for _ in assignment.bundles],
        strategy="PACK",
        bundle_label_selector=[{"ray.io/node-id": node} for node in assignment.bundles],
    )
    try:
        if not group.wait(RESERVE_SECONDS):
            raise ClusterError(
                f"RAY_ADDRESS: {len(assignment.bundles)} GPUs could not be reserved within "
                f"{RESERVE_SECONDS:.0f} s; another run holds them. Wait for its end, or use "
                "another Ray cluster"
            )
        yield Placement(assignment, group, hosts)
    finally:
        remove_placement_group(group)


def cluster_nodes() -> list[Node]:
    """Nodes that Ray believes alive, this process's own first, the others by address."""
    here = ray.get_runtime_context().get_node_id()
    found = [
        Node(n["NodeID"], n["NodeManagerAddress"], int(n["Resources"].get("GPU", 0)))
        for n in ray.nodes()
        if n["Alive"]
    ]
    return sorted(found, key=lambda node: (node.id != here, _by_number(node.host), node.id))


@contextmanager
def canary(folder: Path) -> Iterator[Path]:
    """A new file, by which other nodes show that they see this very folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.resolve() / f".seen_{uuid.uuid4().hex}"
    file.touch()
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def answering(nodes: Iterable[str], files: Sequence[str] = ()) -> dict[str, list[str]]:
    """{node id: files it does not see} of the nodes that run a task within ANSWER_SECONDS.

    This process's own node needs no question.
    """
    here = ray.get_runtime_context().get_node_id()
    found: dict[str, list[str]] = {}
    tasks = {}
    for node in nodes:
        if node == here:
            found[node] = []
            continue
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        task = _unseen.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
        tasks[task.remote(files)] = node
    if not tasks:
        return found
    done, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=ANSWER_SECONDS)
    for reference in done:
        try:
            found[tasks[reference]] = ray.get(reference)
        except RayError as error:
            logger.warning("node %s: %s", tasks[reference], str(error).partition("\n")[0])
    for reference in late:
        ray.cancel(reference, force=True)
    return found


def _answers(tasks: list[Any]) -> list[str]:
    try:
        found: list[str] = ray.get(tasks, timeout=ANSWER_SECONDS)
    except GetTimeoutError:
        raise NodeLost(f"a node ran no task for {ANSWER_SECONDS:.0f} seconds") from None
    return found


@ray.remote(max_retries=0)
def _device() -> str:
    """The GPU that Ray has given this task."""
    return os.environ["CUDA_VISIBLE_DEVICES"]


@ray.remote
def _unseen(files: Sequence[str]) -> list[str]:
    return [file for file in files if not listed(Path(file))]


def listed(file: Path) -> bool:
    """Whether its folder lists it: a listing makes a network file system look anew."""
    try:
        return file.name in os.listdir(file.parent)
    except OSError:
        return False


def _by_number(host: str) -> tuple[Any, ...]:
    """10.0.0.9 before 10.0.0.10."""
    return tuple(int(part) if part.isdigit() else 0 for part in host.split(".")), host
