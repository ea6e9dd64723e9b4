"""Tensors end to end in one buffer: what travels as one handle or one broadcast."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

ALIGNMENT = 256
"""Bytes at which each tensor begins: what CUDA allocations and vectorised copies expect."""

Entry = tuple[str, torch.dtype, tuple[int, ...], int]
"""(Hugging Face name, type, shape, first byte)."""


def lay_out(tensors: list[tuple[str, torch.Tensor]]) -> tuple[torch.Tensor, tuple[Entry, ...]]:
    """Copy tensors of one device end to end into a buffer, uint8 [bytes]."""
    entries, end = [], 0
    for name, tensor in tensors:
        start = math.ceil(end / ALIGNMENT) * ALIGNMENT
        entries.append((name, tensor.dtype, tuple(tensor.shape), start))
        end = start + tensor.nbytes
    buffer = torch.empty(end, dtype=torch.uint8, device=tensors[0][1].device)
    for (_, view), (_, tensor) in zip(views(buffer, entries), tensors, strict=True):
        view.copy_(tensor.detach())
    return buffer, tuple(entries)


def views(buffer: torch.Tensor, entries: Iterable[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that `lay_out` put into a buffer."""
    for name, dtype, shape, start in entries:
        size = math.prod(shape) * dtype.itemsize
        yield name, buffer[start : start + size].view(dtype).view(shape)
