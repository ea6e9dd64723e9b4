"""Policy weights on their way to the engines: buckets, and checksums that prove arrival.

A bucket is a list of named arrays. Ray stores NumPy arrays out of band and hands them to every
engine on the machine as views of shared memory, so a bucket is copied once, however many
engines read it. NumPy has no bfloat16: such tensors travel as their 16-bit patterns.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

BUCKET_BYTES = 64 << 20
"""Large enough that per-message costs vanish, small enough that two in flight do not matter."""


class Bucket(Protocol):
    """Some of a model's tensors on their way; once unpickled, it gives them out."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]: ...


@dataclass(frozen=True)
class WeightBucket:
    """Some of a model's tensors: (Hugging Face name, torch dtype name, array)."""

    entries: tuple[tuple[str, str, np.ndarray], ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for _, _, array in self.entries)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, as views of the bucket's memory: read them, never write."""
        for name, dtype, array in self.entries:
            with warnings.catch_warnings():
                # Memory shared through Ray is read-only, which is what a weight should be.
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                yield name, torch.from_numpy(array).view(getattr(torch, dtype))


def pack_buckets(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[WeightBucket]:
    """Group a stream of tensors into buckets of about `bucket_bytes`, in the given order.

    Args:
        named_tensors: (Hugging Face name, tensor on any device).
        dtype: the engine's type; casting here halves what travels. None keeps each tensor's.
        bucket_bytes: a larger tensor gets a bucket of its own.
    """
    entries: list[tuple[str, str, np.ndarray]] = []
    size = 0
    for name, tensor in named_tensors:
        host = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
        array = host.view(torch.int16).numpy() if host.dtype == torch.bfloat16 else host.numpy()
        if entries and size + array.nbytes > bucket_bytes:
            yield WeightBucket(tuple(entries))
            entries, size = [], 0
        entries.append((name, str(host.dtype).removeprefix("torch."), array))
        size += array.nbytes
    if entries:
        yield WeightBucket(tuple(entries))


def tensor_checksum(tensor: torch.Tensor, dtype: torch.dtype) -> str:
    """Checksum of a weight as an engine of type `dtype` holds it.

    Minus zero counts as zero and subnormal numbers as zero: an engine whose packed weights are
    read back through a product with the identity (`readback`) cannot tell them apart.
    """
    value = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    value = torch.where(value.abs() < torch.finfo(dtype).tiny, torch.zeros_like(value), value)
    digest = hashlib.blake2b(repr(tuple(value.shape)).encode(), digest_size=16)
    digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weight_checksums(
    named_tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> dict[str, str]:
    """`tensor_checksum` of every tensor, by name."""
    return {name: tensor_checksum(tensor, dtype) for name, tensor in named_tensors}
