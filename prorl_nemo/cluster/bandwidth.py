"""Bandwidth between the nodes of a Ray cluster: each node to the next, and an all-reduce over all.

By torch.distributed, as the trainer will use it: NCCL with a process for each GPU, gloo with one
for each node. Bus bandwidth is counted as in nccl-tests: bytes times 2 (n - 1) / n over seconds.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prorl_nemo.cluster.placement import Node

BYTES = {"nccl": 1 << 30, "gloo": 1 << 26}
_ROUNDS = 5
_SECONDS = 300.0
SLOW = 0.5
"""A link below this share of the median is reported."""


@dataclass(frozen=True)
class Bandwidths:
    """Bytes a second.

    Attributes:
        to_next: from each node to the next one, the last to the first; empty for a single node.
        all_reduce: bus bandwidth over all processes; None for a single one.
    """

    to_next: list[float]
    all_reduce: float | None

    def slow_links(self) -> list[int]:
        """Nodes whose link to the next is far below the others'."""
        if len(self.to_next) < 3:
            return []
        usual = statistics.median(self.to_next)
        return [i for i, speed in enumerate(self.to_next) if speed < SLOW * usual]


class _Peer:
    """One process of the measurement."""

    def address(self) -> str:
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return f"tcp://{host}:{self.store.port}"

    def join(self, address: str, rank: int, world: int, gpu: bool) -> str:
        import torch
        import torch.distributed as dist

        self.rank, self.world = rank, world
        self.device = torch.device("cuda" if gpu else "cpu")
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=world)
        self.data = torch.ones(BYTES[backend] // 4, device=self.device)
        dist.all_reduce(self.data[:1])  # Connects.
        return socket.gethostname()

    def all_reduce(self) -> float:
        import torch.distributed as dist

        return self._seconds(lambda: dist.all_reduce(self.data))

    def send(self, source: int, target: int) -> float:
        """Seconds of one message from `source` to `target`; the others wait."""
        import torch.distributed as dist

        def message() -> None:
            if self.rank == source:
                dist.send(self.data, target)
            elif self.rank == target:
                dist.recv(self.data, source)

        return self._seconds(message)

    def bytes(self) -> int:
        return int(self.data.nbytes)

    def _seconds(self, work: Callable[[], Any]) -> float:
        """Median of some rounds, each begun together."""
        import torch
        import torch.distributed as dist

        found = []
        for _ in range(_ROUNDS):
            dist.barrier()
            started = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - started)
        return statistics.median(found)


_PEER: Any = ray.remote(_Peer)


def measure(nodes: Sequence[Node], gpu: bool) -> Bandwidths:
    """Measure over these nodes, their GPUs or their CPUs; takes some seconds, and memory for one
    tensor a process."""
    homes = [i for i, node in enumerate(nodes) for _ in range(node.gpus if gpu else 1)]
    if len(homes) < 2:
        return Bandwidths([], None)
    variables = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    peers = [
        _PEER.options(
            num_cpus=0,
            num_gpus=1 if gpu else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(nodes[home].id, soft=False),
            runtime_env={"env_vars": variables},
        ).remote()
        for home in homes
    ]
    try:
        address = ray.get(peers[0].address.remote(), timeout=_SECONDS)
        joined = [p.join.remote(address, i, len(peers), gpu) for i, p in enumerate(peers)]
        ray.get(joined, timeout=_SECONDS)
        size = ray.get(peers[0].bytes.remote())
        seconds = max(ray.get([peer.all_reduce.remote() for peer in peers], timeout=_SECONDS))
        share = 2 * (len(peers) - 1) / len(peers)
        to_next = []
        if len(nodes) > 1:
            first = [homes.index(i) for i in range(len(nodes))]
            for source, target in zip(first, [*first[1:], first[0]], strict=True):
                times = [peer.send.remote(source, target) for peer in peers]
                to_next.append(size / ray.get(times, timeout=_SECONDS)[target])
        return Bandwidths(to_next, size * share / seconds)
    finally:
        for peer in peers:
            ray.kill(peer)
