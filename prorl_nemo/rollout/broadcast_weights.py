"""Policy weights to engines on other devices: every bucket is one broadcast.

NCCL between GPUs, gloo between CPUs, by the same lines. The trainer rank and all engines form a
process group for one update; descriptions of the buckets travel with the fleet's calls, their
bytes in the broadcast. vLLM's own `nccl` back end (which moves tensors one by one and needs its own
commands to the engine) is not used: here the engine checks and loads what arrives as always.

A group cannot lose a member: when an engine dies in an update, all of them are replaced and take
the weights through host memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from prorl_nemo.rollout.flat_buffers import Entry, lay_out, views
from prorl_nemo.rollout.weights import BUCKET_BYTES, grouped


@dataclass(frozen=True)
class Meeting:
    """Where the process group of one update comes together.

    Attributes:
        host: of the sender's store.
        port: of the same.
        members: the sender and its receivers.
        backend: nccl or gloo.
        seconds: how long a member waits for the others.
    """

    host: str
    port: int
    members: int
    backend: str
    seconds: float


@dataclass(frozen=True)
class BroadcastBucket:
    """Some of a model's tensors, which arrive while they are given out."""

    meeting: Meeting
    nbytes: int
    entries: tuple[Entry, ...]

    def tensors(self, *others: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, whole. Every receiver must ask once for each bucket, in their order."""
        group, device = _joined(self.meeting)
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        group.broadcast(buffer, 0).wait()
        yield from views(buffer, self.entries)


def broadcast_buckets(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    receivers: int,
    host: str,
    *,
    limit: int = BUCKET_BYTES[1],
    seconds: float = 900.0,
) -> Iterator[BroadcastBucket]:
    """As `weights.pack_buckets`; what follows a bucket's `yield` sends it, and waits for all.

    Args:
        receivers: processes that will ask each bucket for its tensors.
        host: this process's address as the receivers know it.
        seconds: see `Meeting`.
    """
    store, group = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False), None
    for pieces in grouped(named_tensors, None, limit):
        buffer, entries = lay_out([(piece.name, piece.tensor) for piece, _ in pieces])
        backend = "nccl" if buffer.is_cuda else "gloo"
        meeting = Meeting(host, store.port, receivers + 1, backend, seconds)
        yield BroadcastBucket(meeting, buffer.nbytes, entries)
        group = group or _group(store, 0, meeting)
        group.broadcast(buffer, 0).wait()


@lru_cache(maxsize=1)
def _joined(meeting: Meeting) -> tuple[Any, torch.device]:
    """This process's membership, as long as the update lasts; the next one drops it."""
    patience = timedelta(seconds=meeting.seconds)
    store = dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=patience)
    kind = "cuda" if meeting.backend == "nccl" else "cpu"
    # Whoever comes first is receiver 1: which is which does not matter.
    return _group(store, store.add("receivers", 1), meeting), torch.device(kind)


def _group(store: dist.Store, rank: int, meeting: Meeting) -> Any:
    patience = timedelta(seconds=meeting.seconds)
    if meeting.backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, meeting.members, patience)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = patience
    return dist.ProcessGroupNCCL(store, rank, meeting.members, options)
