"""Policy weights in a memory file of the trainer, which engines on the same machine map.

The object store gives every update new pages, which sender and receiver have to touch for the first
time; that costs more than copying them. A memory file stays from update to update: the ranks copy
their weights into the same places, and the engines read them there. Ranks that share matrices write
their pieces side by side into one file, so that nobody joins them. The file has no name in any
folder, and is gone with the processes that map it. Our choice.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from prorl_nemo.rollout.flat_buffers import ALIGNMENT
from prorl_nemo.rollout.weights import BUCKET_BYTES, Entry, Piece, grouped

_ROOM = 64 << 20
"""The file grows by as much: mapping it again costs its pages once more."""


class MemoryFile(NamedTuple):
    """Where a memory file is found by other processes of this machine and user.

    Attributes:
        inode: tells it from another one that has come into its place.
    """

    process: int
    descriptor: int
    inode: int

    def open(self, flags: int) -> int:
        """A descriptor of this process. Raises ValueError if the file's process has ended."""
        try:
            descriptor = os.open(f"/proc/{self.process}/fd/{self.descriptor}", flags)
        except OSError as error:
            raise ValueError(f"weights of process {self.process}: {error.strerror}") from None
        if os.fstat(descriptor).st_ino != self.inode:
            os.close(descriptor)
            raise ValueError(f"weights of process {self.process}: it has other ones now")
        return descriptor


class Place(NamedTuple):
    """Where a whole tensor lies in the file.

    Attributes:
        shape: of all ranks' pieces together.
        dim, size: of `shape`, what belongs to the tensor; see `weights.join`.
    """

    name: str
    dtype: str
    start: int
    shape: tuple[int, ...]
    dim: int | None
    size: int | None


@dataclass(frozen=True)
class SharedBucket:
    """Some of a model's tensors in a memory file. Travels as the description of where they are.

    What it shows changes with the next update of the ranks that made it. All but the first of
    them name no tensors: their bucket says that their pieces are written.
    """

    file: MemoryFile
    bytes: int
    places: tuple[Place, ...]

    def tensors(self, *others: SharedBucket) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, whole, as read-only views of the senders' memory.

        Raises:
            ValueError: the file is gone: its process has ended.
        """
        memory = _mapped(self.file, self.bytes) if self.places else np.empty(0, dtype=np.uint8)
        for place in self.places:
            dtype = getattr(torch, place.dtype)
            # NumPy has no bfloat16; see weights.py.
            stored = np.int16 if dtype == torch.bfloat16 else np.dtype(place.dtype)
            end = place.start + math.prod(place.shape) * dtype.itemsize
            array = memory[place.start : end].view(stored).reshape(place.shape)
            if place.dim is not None:
                array = array[(slice(None),) * place.dim + (slice(place.size),)]
            yield place.name, Entry(place.name, place.dtype, array, None, None).tensor()


def make_memory_file() -> MemoryFile:
    """An empty one, which lives as long as this process."""
    descriptor = os.memfd_create("weights")
    return MemoryFile(os.getpid(), descriptor, os.fstat(descriptor).st_ino)


class SharedWeights:
    """What one rank writes into the file of all ranks that share matrices, update after update.

    Args:
        rank, ranks: its place among them.
    """

    def __init__(self, file: MemoryFile, rank: int = 0, ranks: int = 1) -> None:
        self._file, self._rank, self._ranks = file, rank, ranks
        self._descriptor = file.open(os.O_RDWR)
        self._memory = torch.empty(0, dtype=torch.uint8)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def pack_buckets(
        self,
        pieces: Iterable[Piece | tuple[str, torch.Tensor]],
        dtype: torch.dtype | None = None,
        limit: int = BUCKET_BYTES[1],
    ) -> Iterator[SharedBucket]:
        """As `weights.pack_buckets`; what was written for the update before must have been read."""
        end = 0
        for group in grouped(pieces, dtype, limit):
            places = []
            for (name, tensor, dim, size), kind in group:
                shape = list(tensor.shape)
                if dim is not None:
                    shape[dim] *= self._ranks
                start = math.ceil(end / ALIGNMENT) * ALIGNMENT
                end = start + math.prod(shape) * kind.itemsize
                self._reserve(end)
                if dim is not None or self._rank == 0:
                    whole = self._memory[start:end].view(kind).view(shape)
                    self._part(whole, dim).copy_(tensor.detach())
                shown = str(kind).removeprefix("torch.")
                places.append(Place(name, shown, start, tuple(shape), dim, size))
            named = tuple(places) if self._rank == 0 else ()
            yield SharedBucket(self._file, self._memory.nbytes, named)

    def _part(self, whole: torch.Tensor, dim: int | None) -> torch.Tensor:
        return whole if dim is None else whole.chunk(self._ranks, dim)[self._rank]

    def _reserve(self, size: int) -> None:
        if size <= self._memory.nbytes:
            return
        size = math.ceil(size / _ROOM) * _ROOM
        # Never makes it smaller, whichever rank is ahead.
        os.posix_fallocate(self._descriptor, 0, size)
        self._memory = torch.frombuffer(mmap.mmap(self._descriptor, size), dtype=torch.uint8)


@lru_cache(maxsize=64)
def _mapped(file: MemoryFile, size: int) -> np.ndarray:
    descriptor = file.open(os.O_RDONLY)
    try:
        return np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), dtype=np.uint8)
    finally:
        os.close(descriptor)
