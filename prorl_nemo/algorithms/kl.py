"""Estimators of KL(policy || reference) per token, and what their gradients really are.

k1, k2, k3 are those of J. Schulman, 'Approximating KL divergence' (2020), with
u = log pi - log pi_ref on tokens drawn from the policy. The term enters the loss directly, so
what matters is the mean of the estimate's *gradient*, which is not the gradient of its mean:

    estimator   value                gradient per token              mean gradient
    k1          u                    grad log pi                     0 (no regularisation at all)
    k2          u^2 / 2              u * grad log pi                 grad KL(policy || reference)
    k3          exp(-u) - 1 + u      (1 - exp(-u)) * grad log pi     grad KL(reference || policy)

ProRL v2 uses k2 with u clamped to +-10. A clamped token has no gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prorl_nemo.algorithms.checks import check_logprobs

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    estimator: Estimator = "k2",
    input_clamp: float | None = 10.0,
    output_clamp: float | None = None,
) -> Tensor:
    """KL estimate [tokens] in nats, differentiable in `logprobs` only.

    Args:
        logprobs: [tokens], current policy.
        reference_logprobs: [tokens], treated as constant.
        input_clamp: limit of |u| (ProRL v2: 10; NeMo-RL: 20). Without it k3 overflows
            float32 below u = -88.
        output_clamp: limit of |estimate| (NeMo-RL, OpenRLHF: 10, which for k2 ends the
            gradient at |u| = 4.47 already).

    Raises:
        ValueError: shapes differ, or log-probabilities in less than float32.
    """
    check_logprobs(logprobs=logprobs, reference_logprobs=reference_logprobs)
    u = logprobs - reference_logprobs.detach()
    if input_clamp is not None:
        u = u.clamp(-input_clamp, input_clamp)
    if estimator == "k1":
        estimate = u
    elif estimator == "k2":
        estimate = 0.5 * u**2
    elif estimator == "k3":
        # expm1 keeps the digits that exp(-u) - 1 loses for the small u of a healthy run.
        estimate = torch.expm1(-u) + u
    else:
        raise ValueError(f"unknown KL estimator {estimator!r}; use k1, k2 or k3")
    return estimate if output_clamp is None else estimate.clamp(-output_clamp, output_clamp)
