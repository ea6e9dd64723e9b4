"""Layers that take the place of Transformer Engine's where it is absent.

* `RMSNorm`: Megatron's local norm refuses sequence parallelism; this one marks
  its weight for the gradient all-reduce that sequence parallelism needs.
* `PackedAttention`: core attention on torch SDPA over packed rows.
* `PackedRotaryEmbedding`: the rotary angles of each token's own position.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from prorl_nemo.megatron.packing import PackedRow, Tree

# Below this many tokens a tree is one masked product: fewer, larger kernels beat
# skipping the masked part. Above it each response is computed by itself.
_ONE_PRODUCT_TOKENS = 768


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32, as transformers computes it."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each rank sees a part of the sequence: Megatron sums such gradients over TP.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        # A bf16 layer takes bf16, whether the residual stream is kept in fp32 or not.
        return self.weight * wide.to(self.weight.dtype)


class PackedRotaryEmbedding(RotaryEmbedding):
    """Rotary angles for the positions of a packed row.

    GPTModel asks first for the sequence length, handing over the packed
    parameters, then for the angles of that length. Here the "length" is the
    row's positions, so no state is kept between the two calls.
    """

    def get_rotary_seq_len(self, *args: Any, **_: Any) -> Any:
        row = args[4]
        if not isinstance(row, PackedRow):
            raise TypeError("the policy computes packed rows only")
        return row.position_ids

    def forward(self, max_seq_len: Any, *_: Any, **__: Any) -> Tensor:
        """Angles [tokens, 1, 1, dim] in fp32."""
        angles = torch.outer(max_seq_len.to(torch.float32), self.inv_freq.float())
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


class PackedAttention(nn.Module):
    """Attention inside each tree of a packed row: causal, responses blind to each other.

    Forward: query [tokens, 1, heads, dim], key and value [tokens, 1, groups, dim] of the
    tokens this rank holds; returns [tokens, 1, heads * dim]. Cost grows with the sum of
    squared tree lengths, never with the square of the row. Under context parallelism keys and
    values of the whole row are gathered, and the rank computes its own queries.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if attention_type != "self" or (attention_dropout or config.attention_dropout):
            raise ValueError("PackedAttention computes self-attention without dropout")
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        if not isinstance(packed_seq_params, PackedRow):
            raise TypeError("PackedAttention needs a PackedRow")
        if len(packed_seq_params.pieces) > 1:
            key, value = _gather_row(torch.cat((key, value), dim=-1)).chunk(2, dim=-1)
        # [tokens, 1, heads, dim] -> [1, heads, tokens, dim]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if k.shape[1] != q.shape[1]:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        parts = []
        held = 0
        for start, stop in packed_seq_params.pieces:
            for tree in packed_seq_params.trees:
                first, last = max(start, tree.start), min(stop, tree.start + tree.length)
                if first >= last:
                    continue
                if len(tree.responses) > 1:
                    parts.extend(self._shared_prompt(q, k, v, tree))
                else:
                    mine = q[:, :, held + first - start : held + last - start]
                    seen = slice(tree.start, last)
                    parts.append(self._causal(mine, k[:, :, seen], v[:, :, seen]))
            held += stop - start
        out = torch.cat(parts, dim=2)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The queries are those of the last keys."""
        before = k.shape[2] - q.shape[2]
        if before == 0:
            return self._attend(q, k, v)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        return self._attend(q, k, v, mask.tril(before))

    def _shared_prompt(self, q: Tensor, k: Tensor, v: Tensor, tree: Tree) -> list[Tensor]:
        span = slice(tree.start, tree.start + tree.length)
        if tree.length <= _ONE_PRODUCT_TOKENS:
            mask = tree_mask(tree, q.device)
            return [self._attend(q[:, :, span], k[:, :, span], v[:, :, span], mask)]
        prompt = slice(tree.start, tree.start + tree.prompt)
        parts = [self._attend(q[:, :, prompt], k[:, :, prompt], v[:, :, prompt])]
        start = prompt.stop
        for length in tree.responses:
            own = slice(start, start + length)
            seen_k = torch.cat((k[:, :, prompt], k[:, :, own]), dim=2)
            seen_v = torch.cat((v[:, :, prompt], v[:, :, own]), dim=2)
            parts.append(self._causal(q[:, :, own], seen_k, seen_v))
            start += length
        return parts

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )


def _gather_row(held: Tensor) -> Tensor:
    """[held tokens, ...] of every context-parallel rank -> [tokens, ...] in the row's order."""
    group = parallel_state.get_context_parallel_group()
    gathered = gather_from_sequence_parallel_region(held, group=group)
    ranks = group.size()
    # Each rank's first piece comes from the front, its second from the back (context_share).
    pieces = gathered.view(ranks, 2, -1, *held.shape[1:])
    front, back = pieces[:, 0], pieces[:, 1].flip(0)
    return torch.cat((front, back)).reshape(gathered.shape)


@functools.lru_cache(maxsize=512)
def tree_mask(tree: Tree, device: torch.device | str = "cpu") -> Tensor:
    """[length, length] bool, True where a token may look: prompt and own response, causally."""
    branch = torch.zeros(tree.length, dtype=torch.int64, device=device)
    start = tree.prompt
    for number, length in enumerate(tree.responses, start=1):
        branch[start : start + length] = number
        start += length
    visible = (branch[None, :] == 0) | (branch[:, None] == branch[None, :])
    return visible & torch.ones_like(visible).tril()
