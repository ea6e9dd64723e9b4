"""The policy's weights of a checkpoint under their Hugging Face names, without the trainer.

A checkpoint holds whole tensors, cut along any axis into the ranks' files; torch puts them
together in one process. So neither Megatron, nor the layout they were written in, nor a GPU is
needed, and no more than one kind of tensor (of all layers) is in memory at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from prorl_nemo.errors import ModelError, UserError
from prorl_nemo.megatron.hf_weights import Shape, rule_for
from prorl_nemo.megatron.layout import ModelSpec

# Of the keys that are not the policy's weights. See checkpoint.py.
_OTHERS = ("reference.", "optimizer.")
_LAYERS = "decoder.layers."


def check_model(folder: Path, spec: ModelSpec) -> None:
    """Weights of the same shapes may belong to another model: other heads, other rotary base.

    Raises:
        ModelError: the checkpoint was written for another model.
    """
    found = torch.load(folder / "common.pt", weights_only=True).get("spec", {})
    differ = [key for key, value in asdict(spec).items() if found.get(key) != value]
    if differ:
        raise ModelError(
            f"model: {folder} was written for another model (its {', '.join(differ)} differ); "
            "give the model the run began with"
        )


def stored_weights(folder: Path, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of the policy in `folder` (`policy/` of a checkpoint).

    In the type they were trained in. A tied output head is left out.

    Raises:
        ModelError: the checkpoint was written for another model.
        UserError: a value is missing, NaN or infinite.
    """
    check_model(folder, spec)
    shape = Shape(spec.heads, spec.groups, spec.groups, spec.head_dim, spec.vocab, spec.vocab)
    kinds = FileSystemReader(folder).read_metadata().state_dict_metadata
    for key, kind in kinds.items():
        if not isinstance(kind, TensorStorageMetadata) or key.startswith(_OTHERS):
            continue
        stored = _read(folder, key, kind)
        for name, tensor in _named(key, stored):
            rule = rule_for(name, 0, shape)
            for hf_name, part in zip(rule.names, rule.export([tensor]), strict=True):
                yield hf_name, part.clone(memory_format=torch.contiguous_format)


def _read(folder: Path, key: str, kind: TensorStorageMetadata) -> Tensor:
    # A part that no file holds stays NaN, and is seen.
    whole = torch.full(kind.size, torch.nan, dtype=kind.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load({key: whole}, storage_reader=FileSystemReader(folder), no_dist=True)
    if not torch.isfinite(whole).all():
        raise UserError(
            f"{folder}: {key} has values that are missing, NaN or infinite; take another step"
        )
    return whole


def _named(key: str, stored: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Megatron's parameters: of layers, all are stored as one tensor [layers, ...]."""
    if not key.startswith(_LAYERS):
        yield key, stored
        return
    for number, tensor in enumerate(stored):
        yield f"{_LAYERS}{number}.{key.removeprefix(_LAYERS)}", tensor
