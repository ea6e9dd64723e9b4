"""How much better each response is than expected: REINFORCE++-baseline (v2) and GRPO (v1).

REINFORCE++-baseline (arXiv 2501.03262): subtract the group's mean, then normalise over the
whole rollout batch. The paper writes the batch statistics per response; the codes that go by
ProRL v2's name (NeMo-RL, OpenRLHF) take them over response tokens, so that long responses
weigh more, and so do we by default. GRPO (arXiv 2402.03300) normalises within the group.

An advantage is constant over a response, so token statistics need only the lengths.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prorl_nemo.algorithms.checks import check_same_shape
from prorl_nemo.algorithms.group_filter import TOLERANCE
from prorl_nemo.algorithms.groups import group_mean_and_variance

Statistics = Literal["token", "sequence"]
Variance = Literal["population", "bessel"]


def reinforce_plus_plus_baseline(
    rewards: Tensor,
    group_ids: Tensor,
    response_lengths: Tensor,
    statistics: Statistics = "token",
    variance: Variance = "population",
    floor: float = 1e-8,
) -> Tensor:
    """(centred - mean(centred)) / sqrt(max(var(centred), floor)), centred = R - group mean.

    The mean includes the response itself; mean and variance run over the whole batch.
    With token statistics a group of equal rewards gets -mean/std, not 0: filter such
    groups first (`group_filter`).

    Args:
        rewards: [batch], shaped.
        group_ids: [batch] integers, one number per prompt.
        response_lengths: [batch] in tokens, each at least 1.
        statistics: count every response token, or every response, once.
        variance: divide by the count N, or by N - 1 (verl, slime).
        floor: least variance, against division by zero.

    Returns:
        [batch] float32, one advantage per response, for all of its tokens.

    Raises:
        ValueError: shapes differ, empty batch, non-finite reward, empty response, unknown name.
    """
    if statistics not in ("token", "sequence") or variance not in ("population", "bessel"):
        raise ValueError(f"unknown statistics {statistics!r} or variance {variance!r}")
    check_same_shape(rewards=rewards, response_lengths=response_lengths)
    mean, _, _ = group_mean_and_variance(rewards, group_ids)
    if bool((response_lengths < 1).any()):
        raise ValueError("response_lengths: every response has at least one token")
    centred = rewards.double() - mean
    weights = response_lengths.double() if statistics == "token" else torch.ones_like(centred)
    count = weights.sum()
    centred = centred - (weights * centred).sum() / count
    squares = (weights * centred**2).sum()
    # A single token has no spread; without the clamp N - 1 would divide zero by zero.
    spread = squares / (count if variance == "population" else (count - 1).clamp(min=1))
    return (centred / spread.clamp(min=floor).sqrt()).float()


def grpo(
    rewards: Tensor, group_ids: Tensor, eps: float = 1e-6, tolerance: float = TOLERANCE
) -> Tensor:
    """(R - group mean) / (group std + eps), with the N - 1 standard deviation (ProRL v1, verl).

    A group whose population standard deviation is within `tolerance` gets exactly 0: dividing
    rounding noise by a tiny eps would give it advantages as large as a real group's.

    Args:
        rewards: [batch], shaped.
        group_ids: [batch] integers, one number per prompt.

    Returns:
        [batch] float32.

    Raises:
        ValueError: shapes differ, empty batch, or a non-finite reward.
    """
    mean, variance, size = group_mean_and_variance(rewards, group_ids)
    std = (variance * size / (size - 1).clamp(min=1)).sqrt()
    advantages = (rewards.double() - mean) / (std + eps)
    return torch.where(variance.sqrt() > tolerance, advantages, 0.0).float()
