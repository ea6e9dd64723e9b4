"""Attention over a packed row, in batches and as one block-sparse kernel, against sequences.

On CPU torch has FlexAttention's forward pass only; `tools/gpu_check.sh` compares gradients.
"""

from __future__ import annotations

import math

import pytest
import torch
from ranks import run_ranks

HEADS, GROUPS, DIM = 4, 2, 8
# (prompt, responses): a shared prompt, a plain sequence, the shortest one, and a long shared prompt
# whose responses fall into several batches.
SHAPES = [(5, (3, 1, 7)), (4, (6,)), (1, (1,)), (300, (250, 2, 400))]


def attend(rank: int, world_size: int, address: str, flex: bool) -> float:
    """Largest deviation from each response attended to alone, with its prompt."""
    from prorl_nemo.megatron.batched_attention import attend_in_batches
    from prorl_nemo.megatron.flex_row import row_attention
    from prorl_nemo.megatron.packing import build_row
    from prorl_nemo.megatron.packing_plan import TrainingItem

    items = [
        TrainingItem([1] * prompt, [[1] * n for n in responses], list(range(len(responses))))
        for prompt, responses in SHAPES
    ]
    row = build_row(items, multiple_of=16)
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, row.tokens, DIM)
    k, v = torch.randn(2, 1, GROUPS, row.tokens, DIM)
    scale = 0.3
    if flex:
        with torch.no_grad():
            found = row_attention(q, k, v, scale, row)
    else:
        found = attend_in_batches(q, k, v, row, scale)

    worst, start = 0.0, 0
    for prompt, responses in SHAPES:
        end = start + prompt
        for length in responses:
            tokens = torch.cat(
                (torch.arange(start, start + prompt), torch.arange(end, end + length))
            )
            wanted = plain(*(x[0][:, tokens] for x in (q, k, v)), scale)
            worst = max(worst, float((found[0][:, tokens] - wanted).abs().max()))
            end += length
        start = end
    assert found.isfinite().all(), "padding"
    return worst


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal softmax attention of [heads, tokens, dim], one query at a time."""
    out = torch.empty_like(q)
    for head in range(HEADS):
        group = head * GROUPS // HEADS
        for i in range(q.shape[1]):
            weights = torch.softmax(scale * (k[group, : i + 1] @ q[head, i]), 0)
            out[head, i] = weights @ v[group, : i + 1]
    return out


@pytest.mark.parametrize("flex", [False, True], ids=["batches", "one kernel"])
def test_each_response_sees_its_prompt_and_itself(flex: bool) -> None:
    (worst,) = run_ranks(attend, 1, flex)
    assert not math.isnan(worst)
    # fp32 sums of some hundred products of size one.
    assert worst < 1e-5
