"""Log-probs and entropy of the response tokens, without the logits matrix.

The [tokens, vocabulary] matrix is computed a chunk of tokens at a time, from
hidden states and the output weight, forward and again in backward, so it is
never whole in memory. The vocabulary may be sharded over tensor-parallel ranks:
maximum, partition sum and target logit are then reduced over them.

Our own kernel-free version of fused linear cross entropy (Wijmans et al., "Cut
your losses", arXiv 2411.09009, has the idea as a CUDA kernel).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Elements of one fp32 logits chunk: 16 M, so 64 MiB, whatever the vocabulary.
_CHUNK_ELEMENTS = 16 * 1024 * 1024


def response_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    vocab_size: int,
    group: Any = None,
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

    Returns:
        (logprobs, entropy), both [tokens] fp32. Gradients flow through logprobs only.
    """
    logprobs, entropy = _LinearLogProbs.apply(
        hidden, weight, targets, float(temperature), vocab_size, group
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
    ) -> tuple[Tensor, Tensor]:
        ranks = dist.get_world_size(group) if group is not None else 1
        rows = weight.shape[0]
        first = rows * (dist.get_rank(group) if ranks > 1 else 0)
        ctx.first, ctx.real = first, max(0, min(rows, vocab_size - first))
        ctx.temperature, ctx.group, ctx.ranks = temperature, group, ranks
        ctx.chunk = max(1, _CHUNK_ELEMENTS // rows)
        tokens = hidden.shape[0]
        logprobs = hidden.new_empty(tokens, dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        log_partition = torch.empty_like(logprobs)
        for start in range(0, tokens, ctx.chunk):
            part = slice(start, min(start + ctx.chunk, tokens))
            logits = _logits(ctx, hidden[part], weight)
            peak = logits.amax(dim=-1)
            _reduce(peak, dist.ReduceOp.MAX, ctx)
            local, inside = _local_targets(ctx, targets[part])
            picked = logits.gather(1, local[:, None]).squeeze(1).masked_fill(~inside, 0.0)
            shifted = logits.sub_(peak[:, None])
            weights = shifted.exp()
            # sum p * logit needs 0 where a padded column holds exp(-inf) * -inf.
            shifted = shifted.nan_to_num(neginf=0.0)
            sums = torch.stack((weights.sum(-1), (weights * shifted).sum(-1), picked))
            _reduce(sums, dist.ReduceOp.SUM, ctx)
            log_sum = sums[0].log()
            log_partition[part] = peak + log_sum
            logprobs[part] = sums[2] - log_partition[part]
            entropy[part] = log_sum - sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, targets, log_partition)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        hidden, weight, targets, log_partition = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, min(start + ctx.chunk, hidden.shape[0]))
            logits = _logits(ctx, hidden[part], weight)
            # d logprob / d logits = (onehot - softmax) / temperature
            delta = logits.sub_(log_partition[part][:, None]).exp_().neg_()
            local, inside = _local_targets(ctx, targets[part])
            delta.scatter_add_(1, local[:, None], inside.to(delta.dtype)[:, None])
            delta = delta.mul_((grad[part] / ctx.temperature)[:, None]).to(hidden.dtype)
            grad_hidden[part] = delta @ weight
            grad_weight += delta.t() @ hidden[part]
        _reduce(grad_hidden, dist.ReduceOp.SUM, ctx)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _logits(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
    """This rank's logits of a chunk over the temperature, fp32, padding at -inf.

    bf16 operands are multiplied with an fp32 result: a logit of 16 rounded to bf16 is off by up
    to 0.06, the larger part of what trainer and engine would disagree by (MiniMax-M1,
    arXiv 2506.13585, section 3.2, found the same).
    """
    logits = _product(hidden, weight)
    if ctx.temperature != 1.0:
        logits.div_(ctx.temperature)
    logits[:, ctx.real :] = float("-inf")
    return logits


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T in fp32."""
    if hidden.dtype != torch.bfloat16:
        return (hidden @ weight.t()).float()
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    # fp32 operands that hold bf16 values lose nothing in oneDNN's bf16 kernel, which is faster.
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        return hidden.float() @ weight.float().t()
    finally:
        settings.fp32_precision = before


def _local_targets(ctx: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Targets as indices into this rank's rows, and which of them lie there."""
    local = targets - ctx.first
    inside = (local >= 0) & (local < ctx.real)
    return local.clamp(0, max(ctx.real - 1, 0)), inside


def _reduce(values: Tensor, operation: Any, ctx: Any) -> None:
    if ctx.ranks > 1:
        dist.all_reduce(values, op=operation, group=ctx.group)
