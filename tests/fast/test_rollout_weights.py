"""Buckets, checksums and seeds: what travels to the engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from prorl_nemo.errors import UserError
from prorl_nemo.rollout.complete_weights import EngineError, checkpoint_shapes, complete_weights
from prorl_nemo.rollout.weights import (
    Piece,
    WeightBucket,
    pack_buckets,
    tensor_checksum,
    weight_checksums,
)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(7, 5, generator=generator),
        "b": torch.randn(300, generator=generator).to(torch.bfloat16),
        "c": torch.randn(4, 6, generator=generator).t(),
        "d": torch.randn((), generator=generator),
    }


def bytes_of(bucket: WeightBucket) -> int:
    return sum(entry.array.nbytes for entry in bucket.entries)


@pytest.mark.parametrize("limit", [1, 200, 1 << 20])
def test_buckets_carry_every_tensor_in_order(limit: int) -> None:
    source = tensors()
    buckets = list(pack_buckets(source.items(), limit=limit))
    arrived = [entry for bucket in buckets for entry in bucket.tensors()]
    assert [name for name, _ in arrived] == list(source)
    for name, tensor in arrived:
        assert tensor.dtype == source[name].dtype
        assert torch.equal(tensor, source[name])
    assert all(len(b.entries) == 1 or bytes_of(b) <= limit for b in buckets)
    assert len(buckets) == {1: 4, 200: 3, 1 << 20: 1}[limit]


def test_buckets_cast_to_the_engine_type() -> None:
    source = tensors()
    (bucket,) = pack_buckets(source.items(), torch.bfloat16)
    for name, tensor in bucket.tensors():
        assert torch.equal(tensor, source[name].to(torch.bfloat16))
    assert bytes_of(bucket) == 2 * sum(t.numel() for t in source.values())


def test_checksum_sees_every_change_an_engine_would() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    base = tensor_checksum(weight, torch.bfloat16)
    assert tensor_checksum(weight.clone(), torch.bfloat16) == base
    assert tensor_checksum(weight.t(), torch.bfloat16) != base
    assert tensor_checksum(weight.reshape(4), torch.bfloat16) != base
    assert tensor_checksum(weight, torch.float32) != base
    changed = weight.clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(9.0))
    assert tensor_checksum(changed, torch.float32) != tensor_checksum(weight, torch.float32)
    # Below the last bit of bfloat16: the same weight.
    assert tensor_checksum(weight * (1 + 1e-5), torch.bfloat16) == base


def test_checksum_ignores_what_the_identity_product_loses() -> None:
    assert tensor_checksum(torch.tensor([-0.0, 1.0]), torch.float32) == tensor_checksum(
        torch.tensor([0.0, 1.0]), torch.float32
    )
    assert tensor_checksum(torch.tensor([1e-40, 1.0]), torch.float32) == tensor_checksum(
        torch.tensor([0.0, 1.0]), torch.float32
    )


def test_checksums_by_name() -> None:
    sums = weight_checksums(tensors().items(), torch.float32)
    assert list(sums) == ["a", "b", "c", "d"]
    assert len(set(sums.values())) == 4


def write_model(folder: Path, tied: bool) -> None:
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    save_file({"model.embed_tokens.weight": torch.zeros(4, 2)}, folder / "a.safetensors")
    save_file({"lm_head.weight": torch.zeros(4, 2)}, folder / "b.safetensors")


def test_checkpoint_shapes_over_shards(tmp_path: Path) -> None:
    write_model(tmp_path, tied=False)
    assert checkpoint_shapes(tmp_path) == {
        "model.embed_tokens.weight": (4, 2),
        "lm_head.weight": (4, 2),
    }


def test_a_tied_head_in_the_checkpoint_is_not_asked_for(tmp_path: Path) -> None:
    write_model(tmp_path, tied=True)
    assert checkpoint_shapes(tmp_path) == {"model.embed_tokens.weight": (4, 2)}


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no safetensors file"):
        checkpoint_shapes(tmp_path)


TIED = {"model.embed_tokens.weight": (4, 2), "model.norm.weight": (2,)}
UNTIED = {**TIED, "lm_head.weight": (4, 2)}
EMBEDDING = ("model.embed_tokens.weight", torch.ones(4, 2))
NORM = ("model.norm.weight", torch.ones(2))
HEAD = ("lm_head.weight", torch.zeros(4, 2))


def test_a_tied_head_is_always_sent() -> None:
    for sent in ([EMBEDDING, NORM], [EMBEDDING, NORM, HEAD]):
        passed = dict(complete_weights(sent, TIED))
        assert passed["lm_head.weight"] is EMBEDDING[1]
        assert list(passed) == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


def test_an_untied_head_is_passed_on_as_it_is() -> None:
    assert list(complete_weights([EMBEDDING, NORM, HEAD], UNTIED)) == [EMBEDDING, NORM, HEAD]


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([EMBEDDING, HEAD], "1 tensors never arrived: model.norm.weight"),
        ([EMBEDDING, NORM], "1 tensors never arrived: lm_head.weight"),
        ([EMBEDDING, NORM, NORM, HEAD], "model.norm.weight: sent twice"),
        ([EMBEDDING, ("other", torch.ones(1))], "other: .* not a tensor of the model"),
        ([("model.norm.weight", torch.ones(3))], r"shape \(3,\), expected \(2,\)"),
    ],
)
def test_an_incomplete_set_of_weights_is_refused(sent: list[Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        list(complete_weights(sent, UNTIED))


def test_pieces_of_two_ranks_join_into_the_tensors() -> None:
    rows, columns, norm = torch.arange(15.0).view(5, 3), torch.arange(8.0).view(2, 4), torch.ones(3)
    # Five rows on two ranks: the second has a row of padding.
    padded = torch.cat((rows, torch.full((1, 3), 9.0)))
    buckets = [
        list(
            pack_buckets(
                [
                    Piece("rows", padded.chunk(2)[rank], 0, 5),
                    Piece("norm", norm),
                    Piece("columns", columns.chunk(2, 1)[rank], 1),
                ],
                limit=40,
                first=rank == 0,
            )
        )
        for rank in (0, 1)
    ]
    # 36 bytes of rows, then 12 and 16, on both ranks alike although the second sends no norm.
    assert [[e.name for e in b.entries] for b in buckets[0]] == [["rows"], ["norm", "columns"]]
    assert [[e.name for e in b.entries] for b in buckets[1]] == [["rows"], ["columns"]]
    found = {
        name: tensor
        for mine, theirs in zip(*buckets, strict=True)
        for name, tensor in mine.tensors(theirs)
    }
    assert list(found) == ["rows", "norm", "columns"]
    assert torch.equal(found["rows"], rows)
    assert torch.equal(found["norm"], norm)
    assert torch.equal(found["columns"], columns)
    with pytest.raises(ValueError, match="rows: a rank sent no piece"):
        list(buckets[0][0].tensors(buckets[1][1]))
    with pytest.raises(ValueError, match="more pieces than the first"):
        list(WeightBucket(()).tensors(buckets[1][1]))
