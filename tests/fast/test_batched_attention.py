"""A row's attention in padded batches, against each token's own softmax written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prorl_nemo.megatron.cpu import enable_cpu

enable_cpu()

from prorl_nemo.megatron import batched_attention  # noqa: E402
from prorl_nemo.megatron.batched_attention import (  # noqa: E402
    Stretch,
    attend_in_batches,
    layout,
    stretches,
)
from prorl_nemo.megatron.packing import PackedRow, build_row, context_share  # noqa: E402
from prorl_nemo.megatron.packing_plan import TrainingItem  # noqa: E402

SCALE, HEADS, GROUPS, DIM = 0.3, 4, 2, 4
CPU = torch.device("cpu")


def row_of(shapes: list[tuple[int, list[int]]], multiple_of: int = 1) -> PackedRow:
    """Of (prompt, responses) in tokens."""
    items = [
        TrainingItem([1] * prompt, [[1] * n for n in responses], list(range(len(responses))))
        for prompt, responses in shapes
    ]
    return build_row(items, multiple_of=multiple_of)


def inputs(row: PackedRow) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in fp32."""
    generator = torch.Generator().manual_seed(0)
    sizes = (HEADS, GROUPS, GROUPS)
    q, k, v = (
        torch.randn(1, n, row.tokens, DIM, generator=generator, requires_grad=True) for n in sizes
    )
    return q, k, v


def seen_by(row: PackedRow) -> list[list[int]]:
    """The tokens that each token of a row may look at."""
    seen: list[list[int]] = []
    for tree in row.trees:
        prompt = list(range(tree.start, tree.start + tree.prompt))
        seen.extend(prompt[: i + 1] for i in range(len(prompt)))
        start = tree.start + tree.prompt
        for length in tree.responses:
            seen.extend([*prompt, *range(start, start + i + 1)] for i in range(length))
            start += length
    return seen


def one_by_one(q: Tensor, k: Tensor, v: Tensor, row: PackedRow) -> Tensor:
    k, v = (x.double().repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    out = []
    for i, tokens in enumerate(seen_by(row)):
        scores = torch.einsum("hd,hsd->hs", q[0, :, i].double(), k[0, :, tokens]) * SCALE
        out.append(torch.einsum("hs,hsd->hd", scores.softmax(-1), v[0, :, tokens]))
    return torch.stack(out, 1)[None]


SHAPES = [
    pytest.param([(1, [n]) for n in (1, 4, 2, 6, 3, 5, 4, 7)], id="plain"),
    pytest.param([(2, [2])] * 8, id="equal"),
    pytest.param([(5, [3, 1, 7]), (4, [6]), (1, [1]), (3, [2, 2])], id="shared prompts"),
    pytest.param([(30, [4, 22, 1]), (2, [40]), (1, [2, 1])], id="far apart"),
    pytest.param([(1, [1])], id="the shortest"),
]


@pytest.mark.parametrize("long", [768, 8], ids=["padded", "unpadded above 8 keys"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_values_and_gradients(
    shapes: list[tuple[int, list[int]]], long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched_attention, "_LONG", long)
    layout.cache_clear()
    row = row_of(shapes, multiple_of=4)
    qkv = inputs(row)
    found, wanted = attend_in_batches(*qkv, row, SCALE), one_by_one(*qkv, row)
    # fp32 sums of some ten products of size one.
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        torch.autograd.grad((found * weight).sum(), qkv),
        torch.autograd.grad((wanted * weight).sum(), qkv),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_of_context_parallel_ranks(ranks: int) -> None:
    """Each computes its own queries with the keys of the whole row."""
    row = row_of([(3, [4]), (1, [8]), (2, [1])], multiple_of=2 * ranks)
    q, k, v = inputs(row)
    whole = attend_in_batches(q, k, v, row, SCALE)
    for rank in range(ranks):
        share = context_share(row, rank, ranks)
        held = torch.cat([torch.arange(start, stop) for start, stop in share.pieces])
        part = attend_in_batches(q[:, :, held], k, v, share, SCALE)
        torch.testing.assert_close(part, whole[:, :, held], rtol=1e-5, atol=1e-6)


def test_padding_does_not_leak() -> None:
    """NaN in one sequence stays there, though its neighbours are padded beside it."""
    row = row_of([(1, [2]), (2, [4]), (1, [1])])
    q, k, v = (x.detach() for x in inputs(row))
    v[:, :, 3:9] = float("nan")
    out = attend_in_batches(q, k, v, row, SCALE)
    assert torch.isfinite(out[:, :, :3]).all() and torch.isfinite(out[:, :, 9:]).all()
    assert out[:, :, 3:9].isnan().all()


def test_bf16_is_computed_in_fp32() -> None:
    row = row_of([(5, [3, 1, 7]), (4, [6])])
    qkv = [x.detach().bfloat16() for x in inputs(row)]
    out = attend_in_batches(*qkv, row, SCALE)
    wide = attend_in_batches(*(x.float() for x in qkv), row, SCALE)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, wide.bfloat16(), rtol=0, atol=0)


def test_stretches_by_hand() -> None:
    row = row_of([(2, [3, 1]), (1, [1])])
    assert list(stretches(row.trees, row.pieces)) == [
        Stretch(0, 2, (0, 0), (0, 2)),
        Stretch(2, 3, (0, 2), (2, 5)),
        Stretch(5, 1, (0, 2), (5, 6)),
        Stretch(6, 2, (6, 6), (6, 8)),
    ]
    # A rank that holds tokens 1 to 2 and 7: a part of the prompt, of a response, of a sequence.
    assert list(stretches(row.trees, [(1, 3), (7, 8)])) == [
        Stretch(0, 1, (0, 0), (0, 2)),
        Stretch(1, 1, (0, 2), (2, 3)),
        Stretch(2, 1, (6, 6), (6, 8)),
    ]


def test_what_is_batched() -> None:
    row = row_of([(1, [n - 1]) for n in (100, 80, 74, 62, 20, 5, 4, 3)] + [(40, [10, 10])])
    sizes = [(b.size, b.queries, b.keys) for b in layout(row.trees, row.pieces, CPU).batches]
    # Responses behind a shared prompt, which need a mask, and then: within a quarter of the
    # longest, or within 16 tokens of it.
    assert sizes == [(2, 10, 50), (2, 100, 100), (2, 74, 74), (1, 40, 40), (3, 20, 20), (1, 3, 3)]
    long = row_of([(1, [n - 1]) for n in (900, 900, 899)])
    assert [b.size for b in layout(long.trees, long.pieces, CPU).batches] == [2, 1]
