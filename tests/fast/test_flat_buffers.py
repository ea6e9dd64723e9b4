"""The layout of a bucket in GPU memory, on tensors of the CPU."""

from __future__ import annotations

import torch

from prorl_nemo.rollout.flat_buffers import ALIGNMENT, lay_out, views


def test_what_is_laid_out_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        ("matrix", torch.randn(7, 3, generator=generator).bfloat16()),
        ("norm", torch.randn(5, generator=generator)),
        ("scalar", torch.tensor(2.5)),
        ("view", torch.randn(4, 6, generator=generator).t()[1:3]),
    ]
    buffer, entries = lay_out(tensors)
    found = dict(views(buffer, entries))
    assert list(found) == [name for name, _ in tensors]
    for name, tensor in tensors:
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    # By hand: 42 bytes, 20 bytes and 4 bytes, each at the next multiple of 256; then 2 x 4 floats.
    assert [start for *_, start in entries] == [0, ALIGNMENT, 2 * ALIGNMENT, 3 * ALIGNMENT]
    assert buffer.nbytes == 3 * ALIGNMENT + 32


def test_views_share_the_buffer() -> None:
    buffer, entries = lay_out([("a", torch.zeros(3)), ("b", torch.ones(2))])
    buffer.zero_()
    assert torch.equal(dict(views(buffer, entries))["b"], torch.zeros(2))
