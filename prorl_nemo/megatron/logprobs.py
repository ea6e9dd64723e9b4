"""Log-probs and entropy of the response tokens, without the logits matrix.

The [tokens, vocabulary] matrix is computed a block at a time from hidden states and the output
weight, forward and again in backward, so it is never whole in memory. Forward keeps a running
maximum and partition sum over the blocks of a token's row (the online softmax of Milakov and
Gimelshein, arXiv 1805.02867). Blocks are as tall as they can be: then a weight is read once, and
its gradient written once, for thousands of tokens. The vocabulary may be sharded over
tensor-parallel ranks, whose sums are merged as blocks are.

Our own kernel-free version of fused linear cross entropy (Wijmans et al., "Cut your losses", arXiv
2411.09009, has the idea as a CUDA kernel). `python -m bench logprobs` measures it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Elements of one fp32 block of logits: 16 M, so 64 MiB, whatever the vocabulary.
_BLOCK_ELEMENTS = 16 * 1024 * 1024
# Tokens of a block: beyond this taller blocks gain nothing and leave too few columns each.
_BLOCK_TOKENS = 8192


def response_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    vocab_size: int,
    group: Any = None,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: [tokens, dim], replicated over the tensor-parallel group.
        weight: [vocabulary / ranks, dim], this rank's rows of the output weight.
        targets: [tokens] int64, ids in the whole vocabulary.
        temperature: the sampling temperature the engine used.
        vocab_size: the true vocabulary; rows beyond it are padding and get no probability
            (a zero row would otherwise add exp(0) to every partition sum).
        group: tensor-parallel process group, or None.
        exact: products of bf16 numbers come out in fp32 (`product`), otherwise in bf16. What
            follows a product is fp32 in any case.

    Returns:
        (logprobs, entropy), both [tokens] fp32. Gradients flow through logprobs only.
    """
    logprobs, entropy = _LinearLogProbs.apply(
        hidden, weight, targets, float(temperature), vocab_size, group, exact
    )
    return logprobs, entropy


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        vocab_size: int,
        group: Any,
        exact: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.ranks = dist.get_world_size(group) if group is not None else 1
        ctx.first = weight.shape[0] * (dist.get_rank(group) if ctx.ranks > 1 else 0)
        ctx.real = max(0, min(weight.shape[0], vocab_size - ctx.first))
        ctx.temperature, ctx.group = temperature, group
        ctx.product = product if exact else torch.matmul
        logprobs = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        entropy, log_partition = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for part in _slices(hidden.shape[0], _BLOCK_TOKENS):
            # Of each token: the largest logit so far, sum of w and of w * (logit - largest),
            # w = exp(logit - largest), and the target's logit.
            peak = torch.full_like(logprobs[part], -torch.inf)
            total, spread, picked = (torch.zeros_like(peak) for _ in range(3))
            for block in _columns(ctx, hidden[part]):
                logits = _logits(ctx, hidden[part], weight[block])
                local, inside = _local(ctx, targets[part], block)
                picked += logits.gather(1, local).squeeze(1) * inside
                higher = torch.maximum(peak, logits.amax(dim=-1))
                _lower(total, spread, peak - higher)
                peak = higher
                shifted = logits.sub_(peak[:, None])
                weights = shifted.exp()
                total += weights.sum(-1)
                spread += shifted.mul_(weights).sum(-1)
            if ctx.ranks > 1:
                highest = peak.clone()
                dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
                _lower(total, spread, peak - highest)
                peak = highest
                sums = torch.stack((total, spread, picked))
                dist.all_reduce(sums, group=group)
                total, spread, picked = sums
            log_partition[part] = peak + total.log()
            logprobs[part] = picked - log_partition[part]
            entropy[part] = total.log() - spread / total
        ctx.save_for_backward(hidden, weight, targets, log_partition)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_partition = ctx.saved_tensors
        scale = grads[0] / ctx.temperature
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part in _slices(hidden.shape[0], _BLOCK_TOKENS):
            for block in _columns(ctx, hidden[part]):
                logits = _logits(ctx, hidden[part], weight[block])
                # d logprob / d logits = (onehot - softmax) / temperature
                delta = logits.sub_(log_partition[part][:, None]).exp_().neg_()
                local, inside = _local(ctx, targets[part], block)
                delta.scatter_add_(1, local, inside.to(delta.dtype)[:, None])
                delta = delta.mul_(scale[part][:, None]).to(weight.dtype)
                grad_hidden[part] += ctx.product(delta, weight[block])
                grad_weight[block] += ctx.product(delta.t(), hidden[part].to(weight.dtype))
        if ctx.ranks > 1:
            dist.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), *[None] * 5


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _columns(ctx: Any, hidden: Tensor) -> Iterator[slice]:
    """Blocks of this rank's vocabulary, padding left out, for these tokens."""
    return _slices(ctx.real, max(1, _BLOCK_ELEMENTS // hidden.shape[0]))


def _logits(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
    """A block of logits over the temperature, [tokens, columns] fp32."""
    if ctx.product is torch.matmul or hidden.dtype == weight.dtype:
        logits = ctx.product(hidden.to(weight.dtype), weight.t()).float()
    else:
        # fp32 hidden states with a bf16 weight: as the sum of two bf16 numbers each, to 16 bits.
        high = hidden.to(weight.dtype)
        logits = product(high, weight.t())
        logits += product((hidden - high).to(weight.dtype), weight.t())
    return logits if ctx.temperature == 1.0 else logits.div_(ctx.temperature)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n] in fp32, always: new memory, of bf16 operands too.

    A logit of 16 rounded to bf16 is off by up to 0.06, the larger part of what trainer and engine
    would disagree by (MiniMax-M1, arXiv 2506.13585, section 3.2, found the same).
    """
    if a.dtype != torch.bfloat16:
        return (a @ b).float()
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    # fp32 operands that hold bf16 values lose nothing in oneDNN's bf16 kernel, which is faster.
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        return a.float() @ b.float()
    finally:
        settings.fp32_precision = before


def _local(ctx: Any, targets: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Targets as columns of a block, [tokens, 1], and which of them lie in it, [tokens]."""
    local = targets - (ctx.first + block.start)
    inside = (local >= 0) & (local < block.stop - block.start)
    return torch.where(inside, local, 0)[:, None], inside


def _lower(total: Tensor, spread: Tensor, change: Tensor) -> None:
    """Make the two sums relative to a largest logit that rose by -change."""
    # Nothing summed yet: the largest was -inf, and -inf * 0 would be NaN.
    change = change.clamp(min=-1e30)
    spread.add_(change * total).mul_(change.exp())
    total.mul_(change.exp())
