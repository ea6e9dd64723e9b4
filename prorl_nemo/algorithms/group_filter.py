"""Which groups carry signal: those whose responses do not all score the same.

ProRL v2 and DAPO (arXiv 2503.14476, section 3.2) drop prompts that every response or none
solves. For rewards that are shares (code, instructions, logic) that means a test on the
standard deviation, not on the mean, and on whole groups, never on single responses. The
tolerance keeps rounding noise from passing as signal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prorl_nemo.algorithms.groups import group_mean_and_variance

TOLERANCE = 1e-6


def has_signal(scores: Sequence[float], tolerance: float = TOLERANCE) -> bool:
    """Whether the population standard deviation of one group's raw scores exceeds `tolerance`.

    Raises:
        ValueError: no scores, or a score is NaN or infinite.
    """
    values = torch.tensor(scores, dtype=torch.float64)
    return bool(groups_with_variance(values, torch.zeros(len(values)).long(), tolerance).all())


def groups_with_variance(values: Tensor, group_ids: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Mask [batch] of the responses whose group's standard deviation exceeds `tolerance`.

    A group passes or fails as a whole; a group of one response has no variance.

    Args:
        values: [batch] scores or shaped rewards.
        group_ids: [batch] integers.

    Raises:
        ValueError: shapes differ, the batch is empty, or a value is NaN or infinite.
    """
    _, variance, _ = group_mean_and_variance(values, group_ids)
    return variance.sqrt() > tolerance
