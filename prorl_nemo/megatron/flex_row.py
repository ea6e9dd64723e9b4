"""Attention of a whole packed row in one block-sparse kernel, for GPUs.

FlexAttention (Dong et al., arXiv 2412.05496) makes the kernel from a function that says which token
sees which: here prompt and own response, causally, inside one tree. Blocks of which nothing is seen
cost nothing, so trees cost what they do alone, without a launch for each response.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from prorl_nemo.megatron.packing import PackedRow


def row_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, row: PackedRow) -> Tensor:
    """Attention of q [1, heads, tokens, dim] over k, v [1, groups, tokens, dim] of a whole row.

    The result is shaped as q. torch has the backward pass on GPUs only.
    """
    if row.block_mask is None:
        row.block_mask = _compiled(create_block_mask, q.is_cuda)(
            _sees(row, q.device), None, None, row.tokens, row.tokens, device=str(q.device)
        )
    attend = _compiled(flex_attention, q.is_cuda)
    out: Tensor = attend(q, k, v, block_mask=row.block_mask, scale=scale, enable_gqa=True)
    return out


@functools.cache
def _compiled(function: Any, compile_it: bool) -> Any:
    """Without compilation the whole mask would be made, and each product in full."""
    return torch.compile(function, dynamic=True) if compile_it else function


def _sees(row: PackedRow, device: torch.device) -> Any:
    """Whether token `i` of the row sees token `j`."""
    tree = torch.empty(row.tokens, dtype=torch.int32)
    branch = torch.zeros(row.tokens, dtype=torch.int32)  # 0 is the prompt
    for number, part in enumerate(row.trees):
        tree[part.start : part.start + part.length] = number
        start = part.start + part.prompt
        for response, length in enumerate(part.responses, start=1):
            branch[start : start + length] = response
            start += length
    tree, branch = tree.to(device), branch.to(device)

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same_path = (branch[j] == 0) | (branch[j] == branch[i])
        return (i >= j) & (tree[i] == tree[j]) & same_path

    return sees
