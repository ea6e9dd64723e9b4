"""Policy weights on their way to the engines: buckets, and checksums that prove arrival.

A bucket is a list of named arrays. Ray stores NumPy arrays out of band and hands them to every
engine on the machine as views of shared memory, so a bucket is copied once, however many
engines read it. NumPy has no bfloat16: such tensors travel as their 16-bit patterns. Ranks that
share matrices each send their pieces, which the engine joins: no rank has to gather them first.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

BUCKET_BYTES = 16 << 20, 256 << 20
"""Least and most: per-message costs vanish, and two of them in flight do not matter."""

BUCKETS = 4
"""Of a model between these: the engines load the first while the trainer packs the second."""


def bucket_bytes(model_bytes: int) -> int:
    """Size of the buckets in which `model_bytes` of weights travel."""
    least, most = BUCKET_BYTES
    return min(max(model_bytes // BUCKETS, least), most)


class Bucket(Protocol):
    """Some of a model's tensors on their way; once unpickled, it gives them out."""

    def tensors(self, *others: Any) -> Iterator[tuple[str, torch.Tensor]]: ...


class Piece(NamedTuple):
    """What one of several ranks has of a tensor.

    Attributes:
        name: in Hugging Face's terms.
        tensor: the whole without `dim`, else one of the pieces that are joined along it.
        dim: see `join`.
        size: see `join`.
    """

    name: str
    tensor: torch.Tensor
    dim: int | None = None
    size: int | None = None


def join(pieces: Sequence[torch.Tensor], dim: int | None, size: int | None) -> torch.Tensor:
    """Pieces of all ranks as one tensor of `size` along `dim`: more is padding, None is all."""
    if dim is None:
        return pieces[0]
    whole = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)
    return whole if size is None else whole.narrow(dim, 0, size)


class Entry(NamedTuple):
    """A `Piece` whose tensor is an array of 16-bit patterns or numbers, and its torch type."""

    name: str
    dtype: str
    array: np.ndarray
    dim: int | None
    size: int | None

    def tensor(self) -> torch.Tensor:
        with warnings.catch_warnings():
            # Memory shared through Ray is read-only, which is what a weight should be.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.array).view(getattr(torch, self.dtype))


@dataclass(frozen=True)
class WeightBucket:
    """Some of a model's tensors, or of one rank's pieces of them."""

    entries: tuple[Entry, ...]

    def tensors(self, *others: WeightBucket) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, joined with the pieces of the other ranks, given in their order.

        What need not be joined is a view of the bucket's memory: read it, never write.

        Raises:
            ValueError: the buckets do not hold pieces of the same tensors.
        """
        rest = [iter(bucket.entries) for bucket in others]
        for entry in self.entries:
            pieces = [entry.tensor()]
            for other in rest if entry.dim is not None else ():
                piece = next(other, None)
                if piece is None or piece.name != entry.name:
                    raise ValueError(f"{entry.name}: a rank sent no piece of it in this bucket")
                pieces.append(piece.tensor())
            yield entry.name, join(pieces, entry.dim, entry.size)
        if any(next(other, None) for other in rest):
            raise ValueError("a rank sent more pieces than the first")


def grouped(
    pieces: Iterable[Piece | tuple[str, torch.Tensor]], dtype: torch.dtype | None, limit: int
) -> Iterator[list[tuple[Piece, torch.dtype]]]:
    """Pieces with the type they travel in, by about `limit` bytes; a larger one is alone.

    Pieces of all ranks are of one size, so their groups begin and end alike.
    """
    group: list[tuple[Piece, torch.dtype]] = []
    size = 0
    for given in pieces:
        piece = Piece(*given)
        kind = dtype or piece.tensor.dtype
        nbytes = piece.tensor.numel() * kind.itemsize
        if group and size + nbytes > limit:
            yield group
            group, size = [], 0
        group.append((piece, kind))
        size += nbytes
    if group:
        yield group


def pack_buckets(
    pieces: Iterable[Piece | tuple[str, torch.Tensor]],
    dtype: torch.dtype | None = None,
    limit: int = BUCKET_BYTES[1],
    first: bool = True,
) -> Iterator[WeightBucket]:
    """Group a stream of tensors into buckets of about `limit` bytes, in the given order.

    Args:
        pieces: on any device; a pair is a name and a whole tensor.
        dtype: the engine's type; casting here halves what travels. None keeps each tensor's.
        limit: a larger tensor gets a bucket of its own.
        first: whether this is the first of the ranks that hold pieces. It alone packs what all
            of them have whole; the buckets of all ranks begin with the same tensor.
    """
    for group in grouped(pieces, dtype, limit):
        entries = []
        for (name, tensor, dim, size), kind in group:
            if first or dim is not None:
                host = tensor.detach().to(device="cpu", dtype=kind).contiguous()
                array = host.view(torch.int16) if kind == torch.bfloat16 else host
                shown = str(kind).removeprefix("torch.")
                entries.append(Entry(name, shown, array.numpy(), dim, size))
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
