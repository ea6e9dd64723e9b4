"""Preconditions on tensors: refuse what torch would quietly broadcast or round.

Our choice. A [batch, 1] against a [batch] broadcasts to [batch, batch], and log-probabilities
kept in bfloat16 turn a probability ratio into noise; both train without an error message.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_same_shape(**tensors: Tensor) -> None:
    """Raises ValueError, naming every tensor and its shape, unless all shapes are equal."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"tensors of one shape expected, found {found}")


def check_logprobs(**tensors: Tensor) -> None:
    """Raises ValueError unless all shapes are equal and all types float32 or float64."""
    check_same_shape(**tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {tensor.dtype}; log-probabilities are kept in float32")
