"""Policy weights to engines on the trainer's own GPU: a handle to the memory instead of its bytes.

CUDA IPC: the trainer lays the tensors of a bucket end to end in one buffer and sends the buffer's
handle; an engine on the same GPU maps it and loads from it (the same idea as vLLM's `ipc` back
end, for the streaming updates of `VllmEngine`). The trainer keeps its buffers until the next
update: an engine that is replaced meanwhile maps them again.

Written and not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from prorl_nemo.rollout.flat_buffers import Entry, lay_out, views
from prorl_nemo.rollout.weights import BUCKET_BYTES, grouped


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
            ValueError: this process does not see the sender's GPU.
        """
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        # Of the GPUs that share an engine's matrices one is the sender's; the others read from it.
        here = {gpu_uuid(index): index for index in range(torch.cuda.device_count())}
        if self.gpu not in here:
            raise ValueError(
                f"rollout.weight_transfer: cuda_ipc needs engine and trainer rank on one GPU, "
                f"found {', '.join(here)} and {self.gpu}; use host"
            )
        device = here[self.gpu]
        # The sender's index of the device (argument 6) may be another one than ours.
        arguments = [*self.handle[:6], device, *self.handle[7:]]
        yield from views(rebuild_cuda_tensor(*arguments), self.entries)


def share_buckets(
    named_tensors: Iterable[tuple[str, torch.Tensor]], limit: int = BUCKET_BYTES[1]
) -> Iterator[tuple[CudaBucket, torch.Tensor]]:
    """As `weights.pack_buckets`, each bucket with the buffer that must live while it is in use."""
    from torch.multiprocessing.reductions import reduce_tensor

    for group in grouped(named_tensors, None, limit):
        buffer, entries = lay_out([(piece.name, piece.tensor) for piece, _ in group])
        # The copies must have happened before another process reads.
        torch.cuda.current_stream().synchronize()
        _, handle = reduce_tensor(buffer)
        yield CudaBucket(gpu_uuid(buffer.device.index), handle, entries), buffer


def gpu_uuid(device: int) -> str:
    """The device's identity, the same in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)
