"""The clipped policy loss per token, and the weights that correct for the inference engine.

Clipping with decoupled bounds: PPO (arXiv 1707.06347) with DAPO's clip-higher (2503.14476);
dual clip: arXiv 1912.09729. The importance weights compare the trainer's log-probs of the old
policy with those the engine sampled with: TIS (truncated), IcePop (masked per token) and
seq-mask-tis (masked per sequence), as configured in NeMo-RL's and OpenRLHF's ProRL v2 recipes.

The loss of a batch is sum(weights * per_token) / N, plus beta * sum(kl) / N, where N counts
the response tokens of the *global* minibatch. Masked tokens stay in N, and the KL term is
neither weighted nor masked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prorl_nemo.algorithms.checks import check_logprobs, check_same_shape

Method = Literal["none", "tis", "icepop", "seq-mask-tis"]

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 before exp (OpenRLHF, verl), so that one token cannot overflow."""


@dataclass(frozen=True)
class ImportanceWeights:
    """Weights [tokens] without gradient, and the share out of bounds.

    The share is one of tokens, for seq-mask-tis of responses.
    """

    weights: Tensor
    out_of_bounds_share: float


@dataclass(frozen=True)
class PolicyLoss:
    """Per-token loss and what its clip did; all [tokens], only `per_token` has a gradient.

    `clipped_low` and `clipped_high` mark the tokens whose gradient the clip removed.
    """

    per_token: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    ratio: Tensor


def importance_weights(
    old_logprobs: Tensor,
    engine_logprobs: Tensor,
    sequence_index: Tensor,
    method: Method,
    low: float,
    high: float,
) -> ImportanceWeights:
    """Weights rho = exp(old - engine), bounded by `method`; bounds are inclusive.

    none: 1 everywhere (the share is still reported). tis: rho clamped to [low, high]. icepop:
    rho inside, 0 outside. seq-mask-tis: raw rho for a response whose geometric mean of rho
    over tokens lies inside, 0 for all tokens of any other.

    Args:
        old_logprobs: [tokens], the trainer's, at rollout time.
        engine_logprobs: [tokens], of the distribution the engine sampled from.
        sequence_index: [tokens] int64, the response each token belongs to. Responses must be
            complete: half of one has another geometric mean.
        low, high: bounds of rho.

    Raises:
        ValueError: shapes differ, no tokens, less than float32, bounds that are not
            0 <= low < high, or a log-probability that is NaN or infinite (every bound would
            pass over it in silence).
    """
    check_logprobs(old_logprobs=old_logprobs, engine_logprobs=engine_logprobs)
    check_same_shape(old_logprobs=old_logprobs, sequence_index=sequence_index)
    if not 0.0 <= low < high:
        raise ValueError(f"importance bounds must satisfy 0 <= low < high, found {low}, {high}")
    log_rho = (old_logprobs - engine_logprobs).detach()
    if not log_rho.numel() or not bool(torch.isfinite(log_rho).all()):
        raise ValueError("importance weights need at least one token and finite log-probabilities")
    rho = log_rho.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    # Bounds are compared as logarithms: exp would round a rho on the bound to either side.
    log_low, log_high = math.log(low) if low > 0 else -math.inf, math.log(high)
    if method == "seq-mask-tis":
        _, index, lengths = torch.unique(sequence_index, return_inverse=True, return_counts=True)
        sums = torch.zeros(len(lengths), dtype=torch.float64, device=log_rho.device)
        log_mean = sums.index_add(0, index, log_rho.double()) / lengths
        outside = (log_mean < log_low) | (log_mean > log_high)
        weights = torch.where(outside[index], 0.0, rho)
    else:
        outside = (log_rho < log_low) | (log_rho > log_high)
        if method == "none":
            weights = torch.ones_like(rho)
        elif method == "tis":
            weights = rho.clamp(low, high)
        elif method == "icepop":
            weights = torch.where(outside, 0.0, rho)
        else:
            raise ValueError(f"unknown importance method {method!r}")
    return ImportanceWeights(weights, outside.double().mean().item())


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = exp(logprobs - old_logprobs).

    Written by the sign of A: a positive advantage bounds the ratio from above only, a negative
    one from below only. With `dual_clip` = c > 1 the loss of a negative advantage stops at c|A|.

    Args:
        logprobs: [tokens], current policy; the gradient flows through it.
        old_logprobs: [tokens], the trainer's, at rollout time.
        advantages: [tokens].
        clip_low, clip_high: distances of the bounds from 1.
        dual_clip: None is off (ProRL); verl's default is 3.

    Raises:
        ValueError: shapes differ, less than float32, or bounds out of range.
    """
    check_logprobs(logprobs=logprobs, old_logprobs=old_logprobs)
    check_same_shape(logprobs=logprobs, advantages=advantages)
    if not (0.0 < clip_low < 1.0 and clip_high > 0.0 and (dual_clip is None or dual_clip > 1.0)):
        raise ValueError(
            "policy loss needs 0 < clip_low < 1, clip_high > 0 and dual_clip above 1 or None, "
            f"found {clip_low}, {clip_high}, {dual_clip}"
        )
    log_ratio = (logprobs - old_logprobs.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    advantages = advantages.detach()
    positive = advantages > 0
    bounded = torch.where(
        positive,
        ratio.clamp(max=1.0 + clip_high),
        ratio.clamp(min=1.0 - clip_low, max=dual_clip),
    )
    ratio = ratio.detach()
    return PolicyLoss(
        per_token=-advantages * bounded,
        clipped_low=(advantages < 0) & (ratio < 1.0 - clip_low),
        clipped_high=positive & (ratio > 1.0 + clip_high),
        ratio=ratio,
    )
