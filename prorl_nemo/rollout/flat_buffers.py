"""Tensors end to end in one buffer: what travels as one handle or one broadcast."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

ALIGNMENT = 256
"""Bytes at which each tensor begins: what CUDA allocations and vectorised copies expect."""

Entry = tuple[str, torch.dtype, tuple[int, ...], int]
"""(Hugging Face name, type, shape, first byte)."""


def portions(
    named_tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None, most: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Group tensors, cast to the engine's type, by about `most` bytes; a larger one is alone."""
    portion: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        cast = tensor.detach().to(dtype or tensor.dtype)
        if portion and size + cast.nbytes > most:
            yield portion
            portion, size = [], 0
        portion.append((name, cast))
        size += cast.nbytes
    if portion:
        yield portion


def lay_out(tensors: list[tuple[str, torch.Tensor]]) -> tuple[torch.Tensor, tuple[Entry, ...]]:
    """Copy tensors of one device end to end into a buffer, uint8 [bytes]."""
    entries, end = [], 0
    for name, tensor in tensors:
        start = math.ceil(end / ALIGNMENT) * ALIGNMENT
        entries.append((name, tensor.dtype, tuple(tensor.shape), start))
        end = start + tensor.nbytes
    buffer = torch.empty(end, dtype=torch.uint8, device=tensors[0][1].device)
    for (_, view), (_, tensor) in zip(views(buffer, entries), tensors, strict=True):
        view.copy_(tensor)
    return buffer, tuple(entries)


def views(buffer: torch.Tensor, entries: Iterable[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that `lay_out` put into a buffer."""
    for name, dtype, shape, start in entries:
        size = math.prod(shape) * dtype.itemsize
        yield name, buffer[start : start + size].view(dtype).view(shape)
