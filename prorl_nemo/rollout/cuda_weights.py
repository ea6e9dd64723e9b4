"""Policy weights to engines on the trainer's own GPU: a handle to the memory instead of its bytes.

CUDA IPC: the trainer lays the tensors of a bucket end to end in one buffer and sends the buffer's
handle; an engine on the same GPU maps it and loads from it (the same idea as vLLM's `ipc` back
end, for the streaming updates of `VllmEngine`). The trainer keeps its buffers until the next
update: an engine that is replaced meanwhile maps them again.

Written and not yet run on a GPU; what needs none is tested (`lay_out`, `views`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from prorl_nemo.rollout.weights import BUCKET_BYTES

ALIGNMENT = 256
"""Bytes at which each tensor begins: what CUDA allocations and vectorised copies expect."""

Entry = tuple[str, torch.dtype, tuple[int, ...], int]
"""(Hugging Face name, type, shape, first byte)."""


@dataclass(frozen=True)
class CudaBucket:
    """Some of a model's tensors in the memory of a GPU. Travels as a handle.

    Attributes:
        gpu: UUID of the device.
        handle: arguments of torch's `rebuild_cuda_tensor` for the buffer, uint8 [bytes].
    """

    gpu: str
    handle: tuple[Any, ...]
    entries: tuple[Entry, ...]

    def tensors(self, *others: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors, whole, as views of the sender's memory: read them, never write.

        Raises:
            ValueError: this process works on another GPU.
        """
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        device = torch.cuda.current_device()
        here = gpu_uuid(device)
        if here != self.gpu:
            raise ValueError(
                f"rollout.weight_transfer: cuda_ipc needs engine and trainer rank on one GPU, "
                f"found {here} and {self.gpu}; use host"
            )
        # The sender's index of the device (argument 6) may be another one than ours.
        arguments = [*self.handle[:6], device, *self.handle[7:]]
        yield from views(rebuild_cuda_tensor(*arguments), self.entries)


def share_buckets(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype | None = None,
    limit: int = BUCKET_BYTES[1],
) -> Iterator[tuple[CudaBucket, torch.Tensor]]:
    """As `weights.pack_buckets`, each bucket with the buffer that must live while it is in use."""
    from torch.multiprocessing.reductions import reduce_tensor

    for tensors in _portions(named_tensors, dtype, limit):
        buffer, entries = lay_out(tensors)
        # The copies must have happened before another process reads.
        torch.cuda.current_stream().synchronize()
        _, handle = reduce_tensor(buffer)
        yield CudaBucket(gpu_uuid(buffer.device.index), handle, entries), buffer


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


def gpu_uuid(device: int) -> str:
    """The device's identity, the same in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _portions(
    named_tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None, most: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
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
