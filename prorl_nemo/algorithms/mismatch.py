"""How far the trainer's log-probs of the sampled tokens are from the engine's.

Both compute the same policy; what differs is kernels, precision and, when something is wrong,
weights or temperature. The figures are NeMo-RL's (token_mult_prob_error, gen_kl_error) and
two plain ones. d = old - engine, the log of the importance ratio.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prorl_nemo.algorithms.checks import check_logprobs, check_same_shape
from prorl_nemo.algorithms.policy_loss import LOG_RATIO_LIMIT


def mismatch_metrics(old_logprobs: Tensor, engine_logprobs: Tensor) -> dict[str, float]:
    """Figures over all response tokens of a step.

    mean_abs: mean |d|, nats. p99: its 99th percentile (nearest rank). token_mult_prob_error:
    mean exp|d|, 1 is perfect; NeMo-RL accepts a median over steps below 1.05 to 1.1. gen_kl:
    mean exp(d) - 1 - d, the k3 estimate of KL(engine || trainer). Exponents stop at 20, which
    keeps every figure finite.

    Args:
        old_logprobs, engine_logprobs: [tokens].

    Raises:
        ValueError: shapes differ, no tokens, less than float32, or a non-finite value.
    """
    d = _log_ratios(old_logprobs, engine_logprobs)
    size = d.abs()
    bounded = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    # Not torch.quantile: it refuses more than 2**24 values, half of a full-scale step.
    rank = -(-99 * size.numel() // 100)
    return {
        "mean_abs": size.mean().item(),
        "p99": size.kthvalue(rank).values.item(),
        "token_mult_prob_error": bounded.abs().exp().mean().item(),
        "gen_kl": (torch.expm1(bounded) - bounded).mean().item(),
    }


def mismatch_by_position(
    old_logprobs: Tensor,
    engine_logprobs: Tensor,
    positions: Tensor,
    edges: Sequence[int] = (128, 1024, 4096, 8192),
) -> dict[str, float]:
    """Mean |d| per stretch of response positions, `{"0-127": ..., "128-1023": ..., "8192+": ...}`.

    A mismatch that grows with the position points at position encoding or the KV cache, one
    that does not at weights, temperature or precision. Stretches without tokens are left out.

    Args:
        old_logprobs, engine_logprobs: [tokens].
        positions: [tokens] integers, 0 for the first token of a response.
        edges: ascending starts of the stretches after the first.

    Raises:
        ValueError: as `mismatch_metrics`, or edges that do not ascend from above 0.
    """
    size = _log_ratios(old_logprobs, engine_logprobs).abs()
    check_same_shape(old_logprobs=old_logprobs, positions=positions)
    starts = [0, *edges]
    if starts != sorted(set(starts)):
        raise ValueError(f"edges must be positive and ascend, found {list(edges)}")
    bucket = torch.bucketize(positions, positions.new_tensor(list(edges)), right=True)
    counts = torch.bincount(bucket, minlength=len(starts)).tolist()
    sums = torch.bincount(bucket, weights=size, minlength=len(starts)).tolist()
    names = [f"{a}-{b - 1}" for a, b in zip(starts, edges, strict=False)] + [f"{starts[-1]}+"]
    rows = zip(names, sums, counts, strict=True)
    return {name: total / count for name, total, count in rows if count}


def mismatch_growth(old_logprobs: Tensor, engine_logprobs: Tensor, positions: Tensor) -> float:
    """Mean |d| over the last quarter of the response positions over that over the first quarter.

    The quarters are of the batch's tokens in order of their position, so that it says the same
    of short and of long responses; tokens of one position stay together. 1 where there are not
    two quarters to compare. Differences below 1e-6 nats, the rounding of float32, count as that.

    Args:
        old_logprobs, engine_logprobs: [tokens].
        positions: [tokens] integers, 0 for the first token of a response.

    Raises:
        ValueError: as `mismatch_metrics`.
    """
    size = _log_ratios(old_logprobs, engine_logprobs).abs()
    check_same_shape(old_logprobs=old_logprobs, positions=positions)
    ordered = positions.sort().values
    quarter = len(ordered) // 4
    first, last = ordered[quarter], ordered[-quarter - 1]
    if first >= last:
        return 1.0
    early, late = size[positions <= first].mean(), size[positions >= last].mean()
    return (late.clamp(min=1e-6) / early.clamp(min=1e-6)).item()


def _log_ratios(old_logprobs: Tensor, engine_logprobs: Tensor) -> Tensor:
    """d [tokens] float64, without gradient."""
    check_logprobs(old_logprobs=old_logprobs, engine_logprobs=engine_logprobs)
    d = (old_logprobs.detach() - engine_logprobs.detach()).double()
    if not d.numel() or not bool(torch.isfinite(d).all()):
        raise ValueError("mismatch needs at least one token and finite log-probabilities")
    return d
