"""Read an engine's weights back under their Hugging Face names.

Three things stand between a checkpoint and what vLLM holds. Projections are fused (q, k, v into
qkv_proj; gate, up into gate_up_proj). Tensor-parallel workers hold shards. And on CPU a linear
layer keeps no matrix at all, only one packed for the kernel; the product of that kernel with the
identity gives the matrix back exactly, because every sum has one term that is not zero. It is also
the stronger proof: these are the numbers the engine computes with, which finds an output head left
stale beside a fresh embedding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import distributed, nn

IDENTITY_ROWS = 512
"""Rows of the identity multiplied at once: bounds the extra memory for wide layers."""


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of a vLLM model as (Hugging Face name, tensor), whole, fused ones apart.

    A tied output head is yielded as `lm_head.weight` too. All tensor-parallel workers must take
    part: each tensor is gathered when it is asked for. Where workers hold different copies of what
    should be one and the same, the copies are yielded as one tensor, of a shape no checkpoint has.
    """
    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for path, module in model.named_modules():
        parent, _, leaf = path.rpartition(".")
        for kind, parameter in module.named_parameters(recurse=False):
            value = _matrix(module) if kind == "weight" else parameter.data
            if leaf not in fused:
                whole = _whole(module, kind, value)
                yield f"{path}.{kind}", whole[: _rows(module, whole)]
                continue
            sizes = module.output_partition_sizes
            for part, piece in zip(fused[leaf], value.split(sizes), strict=True):
                copies = 1 if part == "q_proj" else getattr(module, "num_kv_head_replicas", 1)
                yield f"{parent}.{part}.{kind}", _whole(module, kind, piece, copies)


def _whole(module: nn.Module, kind: str, value: torch.Tensor, copies: int = 1) -> torch.Tensor:
    """A parameter, or a part of a fused one, from the shards of all workers.

    Args:
        copies: neighbouring workers that hold the same shard.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return value
    shards = [torch.empty_like(value.contiguous()) for _ in range(group.world_size)]
    distributed.all_gather(shards, value.contiguous(), group=group.device_group)
    dim = _sharded(module, kind)
    if dim is None:
        dim, copies = 0, group.world_size
    different = [s for i, s in enumerate(shards) if not torch.equal(s, shards[i - i % copies])]
    return torch.cat(shards if different else shards[::copies], dim)


def _sharded(module: nn.Module, kind: str) -> int | None:
    """The dimension along which workers share a parameter; None: each has it whole."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if getattr(module, "tp_size", 1) == 1:
        return None
    if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
        return 0
    return 1 if isinstance(module, RowParallelLinear) and kind == "weight" else None


def _matrix(module: nn.Module) -> torch.Tensor:
    """The weight [out, in] the module computes with, of this worker."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    kernel = getattr(module, "cpu_linear", None)
    if kernel is None or weight.dim() > 2 or _looked_up(module):
        return weight.data
    columns = _input_size(module)
    pieces = []
    for start in range(0, columns, IDENTITY_ROWS):
        rows = min(IDENTITY_ROWS, columns - start)
        identity = torch.zeros(rows, columns, dtype=weight.dtype)
        identity[torch.arange(rows), torch.arange(start, start + rows)] = 1
        pieces.append(kernel(identity, weight, None))
    return torch.cat(pieces).t()


def _looked_up(module: nn.Module) -> bool:
    """An embedding reads rows of its plain matrix; only an output head multiplies by it."""
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    return isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)


def _input_size(module: nn.Module) -> int:
    for name in ("input_size_per_partition", "embedding_dim"):
        size = getattr(module, name, None)
        if isinstance(size, int):
            return size
    raise TypeError(f"{type(module).__name__}: a packed layer of unknown input size")


def _rows(module: nn.Module, value: torch.Tensor) -> int:
    """Rows without the padding vLLM adds to the vocabulary."""
    return int(getattr(module, "org_vocab_size", value.shape[0]))
