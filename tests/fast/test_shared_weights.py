"""Weights through a memory file: an engine maps what the rank wrote, update after update."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from prorl_nemo.rollout import shared_weights
from prorl_nemo.rollout.shared_weights import SharedBucket, SharedWeights, make_memory_file
from prorl_nemo.rollout.weights import Piece


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(7, 5, generator=generator),
        "b": torch.randn(300, generator=generator).to(torch.bfloat16),
        "c": torch.randn(4, 6, generator=generator).t(),
        "d": torch.randn((), generator=generator),
    }


def received(bucket: SharedBucket) -> SharedBucket:
    """As it is after its way through Ray, and on to an engine's workers: a description only."""
    for _ in range(2):
        data = pickle.dumps(bucket)
        assert len(data) < 500 + 100 * len(bucket.places)
        bucket = pickle.loads(data)
    return bucket


@pytest.mark.parametrize("limit", [1, 200, 1 << 20])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_update_arrives_in_the_same_file(limit: int, dtype: torch.dtype | None) -> None:
    weights = SharedWeights(make_memory_file())
    for update in range(3):
        source = tensors(update)
        buckets = list(weights.pack_buckets(source.items(), dtype, limit))
        arrived = [entry for bucket in buckets for entry in received(bucket).tensors()]
        assert [name for name, _ in arrived] == list(source)
        for name, tensor in arrived:
            assert torch.equal(tensor, source[name].to(dtype or source[name].dtype))
        # One map for all updates: its pages are there already.
        assert {(bucket.file, bucket.bytes) for bucket in buckets} == {(weights._file, 64 << 20)}


def test_a_file_that_grew_shows_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_weights, "_ROOM", 1024)
    weights = SharedWeights(make_memory_file())
    source = {f"t{i}": torch.full((200,), float(i)) for i in range(9)}
    buckets = list(weights.pack_buckets(source.items(), limit=800))
    assert len({bucket.bytes for bucket in buckets}) > 1
    for bucket in buckets:
        for name, tensor in received(bucket).tensors():
            assert torch.equal(tensor, source[name])


@pytest.mark.parametrize("limit", [20, 1 << 20])
def test_ranks_write_their_pieces_side_by_side(limit: int) -> None:
    """Five rows on two ranks: the second has a row of padding. The norm is whole on both."""
    rows, columns, norm = torch.arange(15.0).view(5, 3), torch.arange(8.0).view(2, 4), torch.ones(3)
    padded = torch.cat((rows, torch.full((1, 3), 9.0)))
    file = make_memory_file()
    ranks = [SharedWeights(file, rank, 2) for rank in (0, 1)]
    parts = []
    # The second rank is ahead of the first.
    for rank in (1, 0):
        pieces = [
            Piece("rows", padded.chunk(2)[rank], 0, 5),
            Piece("norm", norm + rank),
            Piece("columns", columns.chunk(2, 1)[rank], 1, 3),
        ]
        parts.append(list(ranks[rank].pack_buckets(pieces, torch.bfloat16, limit)))
    assert [len(bucket.places) for bucket in parts[0]] == [0] * len(parts[1])
    found = {
        name: tensor.float()
        for mine, other in zip(parts[1], parts[0], strict=True)
        for name, tensor in received(mine).tensors(received(other))
    }
    assert list(found) == ["rows", "norm", "columns"]
    assert torch.equal(found["rows"], rows)
    assert torch.equal(found["norm"], norm)
    assert torch.equal(found["columns"], columns[:, :3])


def test_a_receiver_cannot_write() -> None:
    weights = SharedWeights(make_memory_file())
    bucket = received(*weights.pack_buckets(tensors().items()))
    memory = shared_weights._mapped(bucket.file, bucket.bytes)
    assert np.shares_memory(dict(bucket.tensors())["a"].numpy(), memory)
    with pytest.raises(ValueError, match="read-only"):
        memory[0] = 1


def test_another_process_reads_and_a_file_that_is_gone_is_named() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_sender, args=(theirs,))
    process.start()
    data = ours.recv_bytes()
    found = dict(pickle.loads(data).tensors())
    for name, tensor in tensors().items():
        assert torch.equal(found[name], tensor)
    shared_weights._mapped.cache_clear()
    ours.send(None)
    process.join()
    # What is mapped stays.
    assert torch.equal(found["a"], tensors()["a"])
    with pytest.raises(ValueError, match=f"weights of process {process.pid}: No such"):
        list(pickle.loads(data).tensors())


def test_a_descriptor_that_means_another_file_now_is_refused() -> None:
    weights = SharedWeights(make_memory_file())
    (bucket,) = weights.pack_buckets(tensors().items())
    other = os.memfd_create("other")
    os.dup2(other, bucket.file.descriptor)
    shared_weights._mapped.cache_clear()
    with pytest.raises(ValueError, match="other ones now"):
        list(received(bucket).tensors())
    os.close(other)


def _sender(connection: Any) -> None:
    weights = SharedWeights(make_memory_file())
    (bucket,) = weights.pack_buckets(tensors().items())
    connection.send_bytes(pickle.dumps(bucket))
    connection.recv()
