"""From a grader's score to the reward that is trained on: truncation and length.

Three rules, always in this order:

1. stop properly: a truncated response keeps `truncated_factor` of its score (DLER, arXiv
   2510.15110; NeMo-RL and OpenRLHF ship 0);
2. overlong: DAPO's linear penalty over the last tokens before the limit (2503.14476, section 3.4);
3. cosine length: ProRL v2's scheduled reward for shorter answers.

Overlong applies to truncated responses as well: otherwise being cut off would pay more than
stopping one token earlier. For the same reason the cosine term can lower a truncated
response (where eta_min is negative) but never raise it. So, of two responses with one length
and one score, the truncated one never earns more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prorl_nemo.algorithms.checks import check_same_shape

CORRECT = 1.0 - 1e-6
"""A raw score from here on is a full score."""


@dataclass(frozen=True)
class CosineLength:
    """weight * eta(length), eta falling from eta_max at length 0 to eta_min at the limit."""

    weight: float
    eta_min: float = 0.0
    eta_max: float = 1.0
    correct_only: bool = True

    def __post_init__(self) -> None:
        if self.weight < 0 or self.eta_min > self.eta_max:
            raise ValueError("cosine length: weight >= 0 and eta_min <= eta_max, or length pays")


@dataclass(frozen=True)
class Overlong:
    """0 up to (limit - buffer_tokens), then linear to -weight at the limit."""

    buffer_tokens: int
    weight: float = 1.0


def stop_properly(scores: Tensor, truncated: Tensor, factor: float) -> Tensor:
    """Scores [batch] with those of truncated responses ([batch] bool) multiplied by `factor`."""
    return torch.where(truncated, factor * scores, scores)


def overlong_penalty(response_lengths: Tensor, response_limit: int, buffer_tokens: int) -> Tensor:
    """Penalty [batch] float64 in [-1, 0]: -(tokens inside the buffer) / buffer_tokens.

    Raises:
        ValueError: the buffer is not between 1 and the limit.
    """
    if not 1 <= buffer_tokens <= response_limit:
        raise ValueError(f"buffer of {buffer_tokens} tokens for a limit of {response_limit}")
    excess = response_lengths.double() - (response_limit - buffer_tokens)
    return -excess.clamp(0, buffer_tokens) / buffer_tokens


def cosine_length_reward(
    response_lengths: Tensor, response_limit: int, eta_min: float = 0.0, eta_max: float = 1.0
) -> Tensor:
    """eta [batch] float64 = eta_min + (eta_max - eta_min) / 2 * (1 + cos(pi * t / T)).

    t is the length in tokens, T the response limit. t / T stops at 1: beyond it the cosine
    would rise again.
    """
    progress = (response_lengths.double() / response_limit).clamp(0.0, 1.0)
    return eta_min + 0.5 * (eta_max - eta_min) * (1.0 + torch.cos(math.pi * progress))


def shape_rewards(
    scores: Tensor,
    response_lengths: Tensor,
    truncated: Tensor,
    response_limit: int,
    *,
    truncated_factor: float = 0.0,
    overlong: Overlong | None = None,
    cosine: CosineLength | None = None,
) -> Tensor:
    """Shaped rewards [batch] float64, by the three rules above in their order.

    Args:
        scores: [batch] raw scores in [0, 1].
        response_lengths: [batch] in tokens.
        truncated: [batch] bool, cut by the response limit.
        response_limit: tokens a response may have in this step.
        truncated_factor: share in [0, 1] that a truncated response keeps.
        overlong: None is off.
        cosine: None is off, also in the off phase of its cycle. With `correct_only` a
            response needs a full *raw* score.

    Raises:
        ValueError: shapes differ, `truncated` is not bool, a score outside [0, 1] (with
            negative scores a factor of 0 would be a bonus), or settings out of range.
    """
    check_same_shape(scores=scores, response_lengths=response_lengths, truncated=truncated)
    if truncated.dtype != torch.bool:
        raise ValueError(f"truncated must be bool, found {truncated.dtype}")
    if response_limit < 1 or not 0.0 <= truncated_factor <= 1.0:
        raise ValueError("shaping needs response_limit >= 1 and 0 <= truncated_factor <= 1")
    scores = scores.double()
    # Written so that NaN fails too; a float32 score may miss 1 by its rounding.
    if not bool(((scores >= -1e-6) & (scores <= 1.0 + 1e-6)).all()):
        raise ValueError("raw scores must lie in [0, 1]")
    shaped = stop_properly(scores, truncated, truncated_factor)
    if overlong is not None:
        shaped = shaped + overlong.weight * overlong_penalty(
            response_lengths, response_limit, overlong.buffer_tokens
        )
    if cosine is not None:
        term = cosine.weight * cosine_length_reward(
            response_lengths, response_limit, cosine.eta_min, cosine.eta_max
        )
        term = torch.where(truncated, term.clamp(max=0.0), term)
        if cosine.correct_only:
            term = torch.where(scores >= CORRECT, term, 0.0)
        shaped = shaped + term
    return shaped
