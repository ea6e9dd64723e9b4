"""The loss of one packed row: what `algorithms/` says of each token, summed.

Megatron divides the gradients by the token count summed over micro-batches, context- and
data-parallel ranks: the exact mean over a minibatch's tokens, however it is split.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prorl_nemo.algorithms.kl import kl_estimate
from prorl_nemo.algorithms.policy_loss import clipped_policy_loss, importance_weights
from prorl_nemo.megatron.packing import PackedRow
from prorl_nemo.recipe import Algorithm
from prorl_nemo.training.batch import StepSettings, TrainingBatch


def row_loss(
    algorithm: Algorithm,
    batch: TrainingBatch,
    settings: StepSettings,
    row: PackedRow,
    output: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum, over the response tokens held here, of clipped loss x importance weight + beta x KL.

    Args:
        output: [2, held targets], log-probs and entropy of the current policy.

    Returns:
        the sum, the number of tokens in it, and figures of them, each a sum.
    """
    logprobs, entropy, device = output[0], output[1].detach(), output.device
    if not row.sample_ids:
        # Padding alone: of no weight, but without a backward pass the other ranks would wait.
        return output.sum(), torch.tensor(0, dtype=torch.int, device=device), {}
    old, reference, engine = (
        _flat(figures, row, device)
        for figures in (batch.old_logprobs, batch.reference_logprobs, batch.engine_logprobs)
    )
    lengths = torch.tensor(row.sample_lengths, device=device)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    advantages = torch.tensor(
        [batch.advantages[s] for s in row.sample_ids], device=device, dtype=torch.float32
    )[sequence]
    # From whole responses, whoever holds their tokens: a geometric mean needs all of one.
    importance = importance_weights(
        old,
        engine,
        sequence,
        algorithm.importance.method,
        algorithm.importance.low,
        algorithm.importance.high,
    ).weights
    held = row.target_index
    old, reference, advantages, importance = (
        x[held] for x in (old, reference, advantages, importance)
    )
    policy = clipped_policy_loss(
        logprobs,
        old,
        advantages,
        settings.clip_low,
        settings.clip_high,
        algorithm.dual_clip,
    )
    kl = kl_estimate(
        logprobs,
        reference,
        algorithm.kl.estimator,
        algorithm.kl.input_clamp,
        algorithm.kl.output_clamp,
    )
    weighted = policy.per_token * importance
    loss = (weighted + algorithm.kl.coefficient * kl).sum()
    figures = {
        "tokens": torch.tensor(float(logprobs.numel())),
        # The schedule divides the loss in place: figures are copies.
        "loss_sum": loss.detach().clone(),
        "kl_sum": kl.detach().sum(),
        "entropy_sum": entropy.sum(),
        "clipped_low_sum": policy.clipped_low.sum(),
        "clipped_high_sum": policy.clipped_high.sum(),
        "ratio_sum": policy.ratio.sum(),
    }
    return loss, torch.tensor(logprobs.numel(), dtype=torch.int, device=device), figures


def supervised_row_loss(row: PackedRow, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Cross-entropy summed over the response tokens held here: next-token prediction.

    Args:
        output: [2, held targets], as in `row_loss`.

    Returns:
        as `row_loss`; of the figures, `loss_sum` is in nats.
    """
    logprobs = output[0]
    count = logprobs.numel() if row.sample_ids else 0
    loss = -logprobs.sum() if count else output.sum()
    tokens = torch.tensor(count, dtype=torch.int, device=output.device)
    if not count:
        return loss, tokens, {}
    # The schedule divides the loss in place: figures are copies.
    figures = {"tokens": torch.tensor(float(count)), "loss_sum": loss.detach().clone()}
    return loss, tokens, figures


def _flat(figures: list[NDArray[np.float32]], row: PackedRow, device: torch.device) -> Tensor:
    """Per-token figures of the row's samples, end to end."""
    return torch.from_numpy(np.concatenate([figures[s] for s in row.sample_ids])).to(device)
