"""One rollout batch from raw scores to advantages, in the order that must not be changed.

1. groups were filtered on the *raw* scores while sampling; checked here again. Filtering on
   shaped rewards would let groups in that differ by length alone;
2. shape the rewards;
3. drop groups that shaping left without variance: with token statistics they would get a
   constant non-zero advantage;
4. advantages over what is left.

The order is our choice; docs/algorithm.md says what others do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prorl_nemo.algorithms.advantages import Statistics, grpo, reinforce_plus_plus_baseline
from prorl_nemo.algorithms.group_filter import groups_with_variance
from prorl_nemo.algorithms.reward_shaping import CosineLength, Overlong, shape_rewards

AdvantageMethod = Literal["reinforce_plus_plus_baseline", "grpo"]


@dataclass(frozen=True)
class BatchAdvantages:
    """What became of each response of a batch.

    Attributes:
        shaped: [batch] float64 rewards.
        kept: [batch] bool; False where the group was dropped after shaping. It may be False
            everywhere (say, each correct response was truncated): then skip the update.
        advantages: [batch] float32; 0 where not kept.
        dropped_groups: groups that shaping left without variance.
    """

    shaped: Tensor
    kept: Tensor
    advantages: Tensor
    dropped_groups: int


def batch_advantages(
    scores: Tensor,
    group_ids: Tensor,
    response_lengths: Tensor,
    truncated: Tensor,
    response_limit: int,
    *,
    method: AdvantageMethod = "reinforce_plus_plus_baseline",
    statistics: Statistics = "token",
    truncated_factor: float = 0.0,
    overlong: Overlong | None = None,
    cosine: CosineLength | None = None,
) -> BatchAdvantages:
    """Shape, drop and normalise a whole rollout batch (all ranks, before minibatches).

    Args:
        scores: [batch] raw scores in [0, 1], float64 where they are shares.
        group_ids: [batch] integers, one number per prompt.
        response_lengths: [batch] in tokens.
        truncated: [batch] bool.
        response_limit: tokens a response may have in this step.
        method, statistics: see `advantages`. GRPO has no batch statistics.
        truncated_factor, overlong, cosine: see `reward_shaping.shape_rewards`.

    Raises:
        ValueError: a group has no variance in its raw scores (the sampler let it through), or
            anything the functions called here refuse.
    """
    signal = groups_with_variance(scores, group_ids)
    if not bool(signal.all()):
        groups = sorted(set(group_ids[~signal].tolist()))
        raise ValueError(f"groups {groups[:8]} have equal raw scores; filter before this step")
    shaped = shape_rewards(
        scores,
        response_lengths,
        truncated,
        response_limit,
        truncated_factor=truncated_factor,
        overlong=overlong,
        cosine=cosine,
    )
    kept = groups_with_variance(shaped, group_ids)
    advantages = torch.zeros(shaped.shape, dtype=torch.float32, device=shaped.device)
    if bool(kept.any()):
        rewards, ids = shaped[kept], group_ids[kept]
        if method == "reinforce_plus_plus_baseline":
            values = reinforce_plus_plus_baseline(rewards, ids, response_lengths[kept], statistics)
        elif method == "grpo":
            values = grpo(rewards, ids)
        else:
            raise ValueError(f"unknown advantage method {method!r}")
        advantages[kept] = values
    return BatchAdvantages(shaped, kept, advantages, len(set(group_ids[~kept].tolist())))
