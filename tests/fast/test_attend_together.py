"""Many short sequences in one padded product, against each by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prorl_nemo.megatron.cpu import enable_cpu

enable_cpu()

from prorl_nemo.megatron.layers import attend_together, worth_padding  # noqa: E402
from prorl_nemo.megatron.packing import Tree  # noqa: E402


def trees_of(lengths: list[int]) -> tuple[Tree, ...]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    # Sequences of one response, and padding at the end, which has none.
    trees = [Tree(s, 1, (n - 1,)) for s, n in zip(starts[:-1], lengths[:-1], strict=True)]
    return (*trees, Tree(starts[-1], lengths[-1], ()))


def one_by_one(q: Tensor, k: Tensor, v: Tensor, trees: tuple[Tree, ...]) -> Tensor:
    """Softmax over each token's own past, written out."""
    out = torch.empty_like(q)
    for tree in trees:
        for i in range(tree.start, tree.start + tree.length):
            seen = slice(tree.start, i + 1)
            scores = torch.einsum("hd,hsd->hs", q[0, :, i], k[0, :, seen]) * 0.3
            out[0, :, i] = torch.einsum("hs,hsd->hd", scores.softmax(-1), v[0, :, seen])
    return out


@pytest.mark.parametrize("lengths", [[2, 5, 3, 7, 4, 6, 5, 8, 1], [4] * 8, [3, 2]])
def test_values_and_gradients(lengths: list[int]) -> None:
    trees = trees_of(lengths)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 3, sum(lengths), 4)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    ]
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    together = attend_together(*inputs, trees, 0.3)
    alone = one_by_one(*inputs, trees)
    # The same sums in fp64.
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad((together * weight).sum(), inputs)
    expected = torch.autograd.grad((alone * weight).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_padding_does_not_leak() -> None:
    """NaN in one sequence stays there, though its neighbours are padded beside it."""
    trees = trees_of([3, 6, 2])
    q, k, v = (torch.randn(1, 2, 11, 4) for _ in range(3))
    v[:, :, 3:9] = float("nan")
    out = attend_together(q, k, v, trees, None)
    assert torch.isfinite(out[:, :, :3]).all() and torch.isfinite(out[:, :, 9:]).all()
    assert out[:, :, 3:9].isnan().all()
    first = F.scaled_dot_product_attention(q[:, :, :3], k[:, :, :3], v[:, :, :3], is_causal=True)
    torch.testing.assert_close(out[:, :, :3], first)


def test_when_it_is_worth_it() -> None:
    assert worth_padding(trees_of([5] * 8))
    assert not worth_padding(trees_of([5] * 7))  # Few.
    assert not worth_padding(trees_of([1] * 8 + [90]))  # Mostly padding.
    assert not worth_padding((*trees_of([5] * 8), Tree(40, 2, (3, 3))))  # A shared prompt.
