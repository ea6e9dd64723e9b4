"""Hugging Face <-> Megatron-Core weights for dense Llama, Qwen2 and Qwen3.

One table of rules says how a Megatron parameter of a rank is made from Hugging
Face tensors and how they are made from it. Load, weight sync and export all go
through it, tensor by tensor, so no rank ever holds a second whole model.

Layouts (Megatron-Core): `linear_qkv` holds, for each query group, the rows
[q ... q, k, v]; a tensor-parallel rank holds whole groups. `linear_fc1` holds,
for each rank, its gate rows then its up rows. `linear_proj` and `linear_fc2` are
split by columns, embeddings and output layer by rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from prorl_nemo.errors import ModelError
from prorl_nemo.rollout.weights import Piece, join

Get = Callable[[str], Tensor]


@dataclass(frozen=True)
class Shape:
    """The figures of a model that the layouts depend on."""

    heads: int
    groups: int
    padded_groups: int
    head_dim: int
    vocab: int
    padded_vocab: int


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter: its Hugging Face names and the two directions.

    load(get, rank, ranks) -> this rank's tensor; pieces(that tensor) -> the rank's piece of each
    Hugging Face tensor, in the order of `names`, as views where that can be. The pieces of all
    ranks, joined along `dim`, are `sizes` long there; what is beyond was added to make ranks
    equal. Without a `dim` every rank has the whole.
    """

    names: tuple[str, ...]
    load: Callable[[Get, int, int], Tensor]
    pieces: Callable[[Tensor], list[Tensor]] = lambda shard: [shard]
    dim: int | None = None
    sizes: tuple[int | None, ...] = (None,)

    def export(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The Hugging Face tensors, from the shards of all ranks in their order."""
        by_name = zip(*(self.pieces(shard) for shard in shards), strict=True)
        return [join(p, self.dim, size) for p, size in zip(by_name, self.sizes, strict=True)]


def _copied(name: str) -> Rule:
    return Rule((name,), lambda get, r, n: get(name))


def _split(name: str, dim: int) -> Rule:
    return Rule((name,), lambda get, r, n: get(name).chunk(n, dim)[r], dim=dim)


def _vocabulary(name: str, shape: Shape) -> Rule:
    def load(get: Get, rank: int, ranks: int) -> Tensor:
        whole = get(name)
        if whole.shape[0] != shape.vocab:
            raise ModelError(f"{name}: {whole.shape[0]} rows, the config says {shape.vocab}")
        rows = shape.padded_vocab // ranks
        part = whole[rank * rows : (rank + 1) * rows]
        if part.shape[0] < rows:
            part = torch.cat((part, part.new_zeros(rows - part.shape[0], *part.shape[1:])))
        return part

    return Rule((name,), load, dim=0, sizes=(shape.vocab,))


def _gate_up(prefix: str) -> Rule:
    names = (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")

    def load(get: Get, rank: int, ranks: int) -> Tensor:
        return torch.cat([get(name).chunk(ranks)[rank] for name in names])

    return Rule(names, load, lambda shard: list(shard.chunk(2)), dim=0, sizes=(None, None))


def _qkv(prefix: str, kind: str, shape: Shape) -> Rule:
    names = tuple(f"{prefix}.{p}_proj.{kind}" for p in "qkv")
    per_group = shape.heads // shape.groups
    added = shape.padded_groups - shape.groups
    rows = [per_group * shape.head_dim, shape.head_dim, shape.head_dim]

    def load(get: Get, rank: int, ranks: int) -> Tensor:
        share = shape.padded_groups // ranks
        mine = slice(rank * share, (rank + 1) * share)
        q, k, v = (get(name) for name in names)
        rest = q.shape[1:]
        q = q.view(shape.groups, per_group * shape.head_dim, *rest)
        k = k.view(shape.groups, shape.head_dim, *rest)
        v = v.view(shape.groups, shape.head_dim, *rest)
        whole = torch.cat((q, k, v), dim=1)
        whole = torch.cat((whole, whole.new_zeros(added, *whole.shape[1:])))
        return whole[mine].reshape(-1, *rest)

    def pieces(shard: Tensor) -> list[Tensor]:
        groups = shard.unflatten(0, (-1, sum(rows)))
        return [part.flatten(0, 1) for part in groups.split(rows, dim=1)]

    return Rule(names, load, pieces, dim=0, sizes=tuple(shape.groups * r for r in rows))


def _output_projection(name: str, shape: Shape) -> Rule:
    """Columns of the attention output; those of added groups are zero."""
    width = shape.heads // shape.groups * shape.head_dim
    columns, added = shape.groups * width, (shape.padded_groups - shape.groups) * width

    def load(get: Get, rank: int, ranks: int) -> Tensor:
        return torch.nn.functional.pad(get(name), (0, added)).chunk(ranks, 1)[rank]

    return Rule((name,), load, dim=1, sizes=(columns,))


def rule_for(name: str, layer_offset: int, shape: Shape) -> Rule:
    """The rule of a Megatron parameter (`decoder.layers.3.mlp.linear_fc1.weight`, ...).

    Args:
        name: parameter name on this rank.
        layer_offset: global index of the rank's first layer.
        shape: see Shape.

    Raises:
        ModelError: no rule for the name; such a weight would silently stay random.
    """
    if name == "embedding.word_embeddings.weight":
        return _vocabulary("model.embed_tokens.weight", shape)
    if name == "output_layer.weight":
        return _vocabulary("lm_head.weight", shape)
    if name == "decoder.final_layernorm.weight":
        return _copied("model.norm.weight")
    parts = name.split(".", 3)
    if parts[:2] == ["decoder", "layers"] and len(parts) == 4:
        hf = f"model.layers.{int(parts[2]) + layer_offset}"
        rules = {
            "input_layernorm.weight": _copied(f"{hf}.input_layernorm.weight"),
            "pre_mlp_layernorm.weight": _copied(f"{hf}.post_attention_layernorm.weight"),
            "self_attention.q_layernorm.weight": _copied(f"{hf}.self_attn.q_norm.weight"),
            "self_attention.k_layernorm.weight": _copied(f"{hf}.self_attn.k_norm.weight"),
            "self_attention.linear_qkv.weight": _qkv(f"{hf}.self_attn", "weight", shape),
            "self_attention.linear_qkv.bias": _qkv(f"{hf}.self_attn", "bias", shape),
            "self_attention.linear_proj.weight": _output_projection(
                f"{hf}.self_attn.o_proj.weight", shape
            ),
            "mlp.linear_fc1.weight": _gate_up(f"{hf}.mlp"),
            "mlp.linear_fc2.weight": _split(f"{hf}.mlp.down_proj.weight", 1),
        }
        # Transformer Engine fuses the norm into the linear layer that follows it.
        rules["self_attention.linear_qkv.layer_norm_weight"] = rules["input_layernorm.weight"]
        rules["mlp.linear_fc1.layer_norm_weight"] = rules["pre_mlp_layernorm.weight"]
        if parts[3] in rules:
            return rules[parts[3]]
    raise ModelError(f"{name}: no mapping to a Hugging Face weight is known for this parameter")


class SafetensorsFolder:
    """Tensors of a Hugging Face folder by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), "model.safetensors")
        self._folder = folder
        self._open: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def get(self, name: str) -> Tensor:
        """A whole tensor, shaped as stored. Raises ModelError where it is missing."""
        if name not in self._file_of:
            raise ModelError(f"{self._folder}: weight {name} is missing")
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(self._folder / file, framework="pt")
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor


@torch.no_grad()
def load_weights(
    model: torch.nn.Module, layer_offset: int, shape: Shape, folder: Path, rank: int, ranks: int
) -> None:
    """Fill one model chunk of this rank from a Hugging Face folder.

    Raises:
        ModelError: a weight is missing, has another shape, or has no mapping.
    """
    source = SafetensorsFolder(folder)

    def get(name: str) -> Tensor:
        # Tied models store the shared matrix once, under the embedding's name.
        if name == "lm_head.weight" and name not in source:
            name = "model.embed_tokens.weight"
        return source.get(name)

    for name, parameter in model.named_parameters():
        value = rule_for(name, layer_offset, shape).load(get, rank, ranks)
        if value.shape != parameter.shape:
            raise ModelError(
                f"{name}: the folder gives {tuple(value.shape)}, the model has "
                f"{tuple(parameter.shape)}"
            )
        parameter.copy_(value)


@torch.no_grad()
def export_pieces(model: torch.nn.Module, layer_offset: int, shape: Shape) -> Iterator[Piece]:
    """This tensor-parallel rank's part of one model chunk, without a collective.

    Pieces come in the same order on every rank, and are joined by whoever gets all of them.
    They may share memory with the model: copy what is to be kept.
    """
    for name, parameter in model.named_parameters():
        rule = rule_for(name, layer_offset, shape)
        parts = rule.pieces(parameter.detach())
        for hf_name, part, size in zip(rule.names, parts, rule.sizes, strict=True):
            yield Piece(hf_name, part, rule.dim, size)


@torch.no_grad()
def export_weights(
    model: torch.nn.Module, layer_offset: int, shape: Shape, group: Any
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of one model chunk, gathered over tensor parallelism.

    Every rank of `group` must run the iterator to its end: each parameter is a collective. Only
    the first of them gets the tensors. They may share memory with the model: copy what is to be
    kept.
    """
    ranks = dist.get_world_size(group)
    first = dist.get_rank(group) == 0
    for name, parameter in model.named_parameters():
        rule = rule_for(name, layer_offset, shape)
        shard = parameter.detach().contiguous()
        shards = [shard]
        if ranks > 1 and rule.dim is not None:
            shards = [torch.empty_like(shard) for _ in range(ranks)] if first else []
            dist.gather(shard, shards or None, group=group, group_dst=0)
        if first:
            yield from zip(rule.names, rule.export(shards), strict=True)
