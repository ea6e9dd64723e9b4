"""Read an engine's weights back under their Hugging Face names.

Two things stand between a checkpoint and what vLLM holds. Projections are fused (q, k, v into
qkv_proj; gate, up into gate_up_proj). And on CPU a linear layer keeps no matrix at all, only one
packed for the kernel; the product of that kernel with the identity gives the matrix back exactly,
because every sum has one term that is not zero. It is also the stronger proof: these are the
numbers the engine computes with, which finds an output head left stale beside a fresh embedding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

IDENTITY_ROWS = 512
"""Rows of the identity multiplied at once: bounds the extra memory for wide layers."""


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of a vLLM model as (Hugging Face name, tensor), fused ones taken apart.

    A tied output head is yielded as `lm_head.weight` too. Tensor parallelism inside the engine
    is not covered: a rank would yield its shards.
    """
    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for path, module in model.named_modules():
        parent, _, leaf = path.rpartition(".")
        for kind, parameter in module.named_parameters(recurse=False):
            value = _matrix(module) if kind == "weight" else parameter.data
            value = value[: _rows(module, value)]
            if leaf not in fused:
                yield f"{path}.{kind}", value
                continue
            sizes = module.output_sizes
            for part, piece in zip(fused[leaf], value.split(sizes), strict=True):
                yield f"{parent}.{part}.{kind}", piece


def _matrix(module: nn.Module) -> torch.Tensor:
    """The weight [out, in] the module computes with."""
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
    size = getattr(module, "input_size", None) or getattr(module, "embedding_dim", None)
    if not isinstance(size, int):
        raise TypeError(f"{type(module).__name__}: a packed layer of unknown input size")
    return size


def _rows(module: nn.Module, value: torch.Tensor) -> int:
    """Rows without the padding vLLM adds to the vocabulary."""
    return int(getattr(module, "org_vocab_size", value.shape[0]))
