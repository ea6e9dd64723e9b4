"""KL estimators: values by hand, and mean gradients against an enumerated categorical."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prorl_nemo.algorithms.kl import Estimator, kl_estimate

LOGITS = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.4], dtype=torch.float64)
REFERENCE = torch.tensor([1.1, 0.2, -0.7, 0.9, -2.0], dtype=torch.float64).log_softmax(-1)

# Sums of five float64 terms of order 1.
EXACT = 1e-14


def one(u: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities whose difference is u."""
    return torch.tensor([u - 1.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "u", "expected"),
    [
        ("k1", 0.5, 0.5),
        ("k2", 0.5, 0.125),
        ("k3", 0.5, 0.10653065971263342),
        ("k1", -2.0, -2.0),
        ("k2", -2.0, 2.0),
        ("k3", -2.0, 4.38905609893065),
    ],
)
def test_values_by_hand(estimator: Estimator, u: float, expected: float) -> None:
    assert kl_estimate(*one(u), estimator).item() == pytest.approx(expected, abs=EXACT)


def mean_gradient(estimator: Estimator, **clamps: float | None) -> Tensor:
    """Gradient in the logits of the estimate's mean over tokens already drawn, by enumeration."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    weights = logprobs.detach().exp()
    (weights * kl_estimate(logprobs, REFERENCE, estimator, **clamps)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def exact_gradient(*, reverse: bool) -> Tensor:
    """Gradient of KL(policy || reference), or of KL(reference || policy), by autograd."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    p, q = (REFERENCE, logprobs) if reverse else (logprobs, REFERENCE)
    (p.exp() * (p - q)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_k2_has_the_gradient_of_the_kl() -> None:
    expected = exact_gradient(reverse=False)
    assert expected.abs().max() > 0.1
    assert torch.allclose(mean_gradient("k2"), expected, rtol=0, atol=EXACT)


def test_k1_does_not_regularise() -> None:
    assert mean_gradient("k1").abs().max() < EXACT


def test_k3_has_the_gradient_of_the_forward_kl() -> None:
    expected = exact_gradient(reverse=True)
    assert not torch.allclose(expected, exact_gradient(reverse=False), atol=0.1)
    assert torch.allclose(mean_gradient("k3"), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_mean_value_is_the_kl(estimator: Estimator) -> None:
    """k1 and k3 are unbiased in value, whatever their gradients."""
    logprobs = LOGITS.log_softmax(-1)
    exact = (logprobs.exp() * (logprobs - REFERENCE)).sum()
    found = (logprobs.exp() * kl_estimate(logprobs, REFERENCE, estimator)).sum()
    assert found.item() == pytest.approx(exact.item(), abs=EXACT)


def test_k2_gradient_per_token_is_u() -> None:
    u = torch.linspace(-9.9, 9.9, 13)
    logprobs = (u - 1.0).requires_grad_()
    kl_estimate(logprobs, torch.full_like(u, -1.0)).sum().backward()
    assert logprobs.grad is not None
    # float32 rounds u - 1 + 1 in its last digit.
    assert torch.allclose(logprobs.grad, u, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("input_clamp", "output_clamp", "limit"),
    [(10.0, None, 10.0), (20.0, 10.0, math.sqrt(20.0)), (3.0, None, 3.0)],
)
def test_clamps_end_the_gradient(
    input_clamp: float, output_clamp: float | None, limit: float
) -> None:
    """k2's output clamp of 10 bites at |u| = 4.47, long before the input clamp."""
    for sign in (-1.0, 1.0):
        for distance, alive in ((0.999, True), (1.001, False)):
            logprobs, reference = one(sign * distance * limit)
            logprobs.requires_grad_()
            kl_estimate(logprobs, reference, "k2", input_clamp, output_clamp).sum().backward()
            assert logprobs.grad is not None
            assert bool(logprobs.grad.abs() > 1) is alive


def test_clamped_values() -> None:
    assert kl_estimate(*one(50.0), "k2").item() == 50.0
    assert kl_estimate(*one(-50.0), "k3", output_clamp=10.0).item() == 10.0
    assert kl_estimate(*one(-50.0), "k1", None, 7.0).item() == -7.0
    assert kl_estimate(*one(50.0), "k2", None).item() == 1250.0


def test_small_differences_survive_float32() -> None:
    """exp(-u) - 1 + u by its letters may miss u^2/2 several times over at u = 1e-4 in float32."""
    u = 1e-4
    found = kl_estimate(torch.tensor([u]), torch.tensor([0.0]), "k3").item()
    # expm1 is good to one unit in the last place of u: 7e-12 of 5e-9.
    assert found == pytest.approx(u * u / 2, rel=2e-3)


def test_reference_gets_no_gradient() -> None:
    reference = torch.tensor([-1.0], requires_grad=True)
    logprobs = torch.tensor([-2.0], requires_grad=True)
    kl_estimate(logprobs, reference).sum().backward()
    assert reference.grad is None


def test_refusals() -> None:
    good = torch.zeros(3)
    with pytest.raises(ValueError, match="one shape"):
        kl_estimate(good, good[:, None])
    with pytest.raises(ValueError, match="bfloat16"):
        kl_estimate(good.bfloat16(), good)
    with pytest.raises(ValueError, match="estimator"):
        kl_estimate(good, good, "k4")  # type: ignore[arg-type]
