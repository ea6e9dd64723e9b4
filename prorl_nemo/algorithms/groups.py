"""Statistics over the responses to one prompt (a group), given back per response.

The common root of the group baseline, GRPO and the variance filter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prorl_nemo.algorithms.checks import check_same_shape


def group_mean_and_variance(values: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, population variance and size of each response's group, in float64.

    Args:
        values: [batch], one number per response.
        group_ids: [batch] integers; equal numbers mean one prompt. Any order, any values.

    Returns:
        (mean, variance, size), each [batch] float64.

    Raises:
        ValueError: shapes differ, the batch is empty, or a value is NaN or infinite.
    """
    check_same_shape(values=values, group_ids=group_ids)
    values = values.double()
    if not values.numel() or not bool(torch.isfinite(values).all()):
        raise ValueError("group statistics need a non-empty batch of finite values")
    _, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(sizes), dtype=torch.float64, device=values.device)
    mean = (zeros.index_add(0, index, values) / sizes)[index]
    # Two passes: the difference of squares E[x^2] - E[x]^2 cancels for near-constant groups.
    variance = (zeros.index_add(0, index, (values - mean) ** 2) / sizes)[index]
    return mean, variance, sizes[index].double()
