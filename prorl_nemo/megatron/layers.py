"""Layers in the place of Megatron's own, with and without Transformer Engine.

* `RMSNorm`: Megatron's local norm refuses sequence parallelism; this one marks
  its weight for the gradient all-reduce that sequence parallelism needs.
* `PackedAttention`: rotary positions and core attention over packed rows, by torch's SDPA in padded
  batches (batched_attention.py) or by FlexAttention (flex_row.py).
* `add_to_residual`, `WideRowParallelLinear`, `FinalNorm`: a residual stream that really is kept in
  fp32, from the first layer to the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from prorl_nemo.megatron.batched_attention import attend_in_batches
from prorl_nemo.megatron.flex_row import row_attention
from prorl_nemo.megatron.logprobs import product
from prorl_nemo.megatron.packing import PackedRow


class RMSNorm(nn.Module):
    """Root-mean-square norm of [..., dim] in fp32, as transformers computes it."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each rank sees a part of the sequence: Megatron sums such gradients over TP.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        # A bf16 layer takes bf16, though the residual stream is kept in fp32.
        return self.weight * self.normalised(x).to(self.weight.dtype)

    def normalised(self, x: Tensor) -> Tensor:
        """x [..., dim] at root-mean-square 1, in fp32."""
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)


class FinalNorm(RMSNorm):
    """The norm before the output head, whose result stays in fp32 (see logprobs.py)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.float() * self.normalised(x)


class WideRowParallelLinear(RowParallelLinear):
    """Row-parallel linear layer whose products leave it in fp32.

    They are summed over tensor-parallel ranks and added to the fp32 residual stream; rounded to
    bf16 before, they would carry a third of the trainer's error, and more the more ranks there
    are. Our choice.

    Forward: [tokens, 1, dim / ranks] to [tokens, 1, dim]; with sequence parallelism to this
    rank's tokens of it.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        output = _WideLinear.apply(x, self.weight)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(output, group=self.tp_group), None


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0].to(weight.dtype)
        return grad @ weight, grad.flatten(0, -2).t() @ x.flatten(0, -2)


def add_to_residual(training: bool, fused: bool) -> Callable[..., Tensor]:
    """What Megatron calls bias-dropout-add, of layers with neither bias nor dropout.

    Megatron's own rounds the residual stream to the layer's type, so that
    `fp32_residual_connection` changes nothing: with bf16 layers the log-probs of SmolLM2-135M are
    then half as far again from the exact ones. Here the wider type of the two stays.
    """

    def add(output: tuple[Tensor, Tensor | None], residual: Tensor, _: float) -> Tensor:
        return residual + output[0]

    return add


class PackedAttention(nn.Module):
    """Attention inside each tree of a packed row: causal, responses blind to each other.

    Forward: query [tokens, 1, heads, dim], key and value [tokens, 1, groups, dim] of the
    tokens this rank holds, not yet rotated; returns [tokens, 1, heads * dim]. They are
    rotated here, because Megatron rounds sines and cosines to bf16. Cost grows with the sum of
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
        *,
        inverse_frequencies: Tensor,
        flex: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.flex = flex
        # No buffer: a cast of the model to bf16 must leave the frequencies in fp32.
        self.inverse_frequencies = inverse_frequencies
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
        # Moved once: a copy from the host in every layer would wait for the GPU each time.
        self.inverse_frequencies = self.inverse_frequencies.to(query.device)
        angles = torch.outer(packed_seq_params.position_ids.float(), self.inverse_frequencies)
        query, key = rotate(query, angles), rotate(key, angles)
        if len(packed_seq_params.pieces) > 1:
            key, value = _gather_row(torch.cat((key, value), dim=-1)).chunk(2, dim=-1)
        # [tokens, 1, heads, dim] -> [1, heads, tokens, dim]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.flex:
            out = row_attention(q, k, v, self.scale, packed_seq_params)
        else:
            out = attend_in_batches(q, k, v, packed_seq_params, self.scale)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of x [tokens, 1, heads, dim] by angles [tokens, dim / 2], in fp32.

    Channel i turns with channel i + dim / 2 (Hugging Face's order of channels).
    """
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    first, second = x.float().chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


def _gather_row(held: Tensor) -> Tensor:
    """[held tokens, ...] of every context-parallel rank -> [tokens, ...] in the row's order."""
    group = parallel_state.get_context_parallel_group()
    gathered = gather_from_sequence_parallel_region(held, group=group)
    ranks = group.size()
    # Each rank's first piece comes from the front, its second from the back (context_share).
    pieces = gathered.view(ranks, 2, -1, *held.shape[1:])
    front, back = pieces[:, 0], pieces[:, 1].flip(0)
    return torch.cat((front, back)).reshape(gathered.shape)
