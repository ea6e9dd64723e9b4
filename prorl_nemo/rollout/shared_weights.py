"""Policy weights in a memory file of the trainer rank, which engines on the same machine map.

The object store gives every update new pages, which sender and receiver have to touch for the first
time; that costs more than copying them. A memory file stays from update to update: the rank copies
its weights into the same place, and the engines read them there. It has no name in any folder, and
is gone with the processes that map it. Our choice.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from prorl_nemo.rollout.flat_buffers import ALIGNMENT
from prorl_nemo.rollout.weights import BUCKET_BYTES, Entry, Piece, WeightBucket, pack_buckets

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
    size: int


class Span(NamedTuple):
    """A tensor's first byte in the file, and its shape."""

    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SharedBucket:
    """Some of a model's tensors in a memory file. Unpickled it is a `WeightBucket` of views.

    What it shows changes with the next update of the rank that made it.

    Attributes:
        entries: with a `Span` in the place of the array.
    """

    file: MemoryFile
    entries: tuple[Entry, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return attach, (self.file, self.entries)


class SharedWeights:
    """A rank's memory file. Made once, used for every update."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("weights")
        self._inode = os.fstat(self._descriptor).st_ino
        self._size = self._end = 0
        self._memory = torch.empty(0, dtype=torch.uint8)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def pack_buckets(
        self,
        pieces: Iterable[Piece | tuple[str, torch.Tensor]],
        dtype: torch.dtype | None = None,
        limit: int = BUCKET_BYTES[1],
        first: bool = True,
    ) -> Iterator[SharedBucket]:
        """As `weights.pack_buckets`; the update before must have been read."""
        self._end = 0
        for bucket in pack_buckets(pieces, dtype, limit, first, self._keep):
            file = MemoryFile(os.getpid(), self._descriptor, self._inode, self._size)
            yield SharedBucket(file, bucket.entries)

    def _keep(self, tensor: torch.Tensor, dtype: torch.dtype) -> Span:
        start = math.ceil(self._end / ALIGNMENT) * ALIGNMENT
        self._end = start + tensor.numel() * dtype.itemsize
        if self._end > self._size:
            self._size = math.ceil(self._end / _ROOM) * _ROOM
            os.ftruncate(self._descriptor, self._size)
            # What the smaller map showed is shown by this one too: it is the same memory.
            mapped = mmap.mmap(self._descriptor, self._size)
            self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
        self._memory[start : self._end].view(dtype).view(tensor.shape).copy_(tensor)
        return Span(start, tuple(tensor.shape))


def attach(file: MemoryFile, entries: tuple[Entry, ...]) -> WeightBucket:
    """The tensors as read-only views of the sender's memory.

    Raises:
        ValueError: the file is gone: its process has ended.
    """
    memory = _mapped(file)
    found = []
    for entry in entries:
        start, shape = entry.array
        dtype = getattr(torch, entry.dtype)
        # NumPy has no bfloat16; see weights.py.
        stored = np.int16 if dtype == torch.bfloat16 else np.dtype(entry.dtype)
        end = start + math.prod(shape) * dtype.itemsize
        found.append(entry._replace(array=memory[start:end].view(stored).reshape(shape)))
    return WeightBucket(tuple(found))


@lru_cache(maxsize=64)
def _mapped(file: MemoryFile) -> np.ndarray:
    try:
        descriptor = os.open(f"/proc/{file.process}/fd/{file.descriptor}", os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"weights of process {file.process}: {error.strerror}") from None
    try:
        if os.fstat(descriptor).st_ino != file.inode:
            raise ValueError(f"weights of process {file.process}: it has other ones now")
        return np.frombuffer(mmap.mmap(descriptor, file.size, prot=mmap.PROT_READ), dtype=np.uint8)
    finally:
        os.close(descriptor)
