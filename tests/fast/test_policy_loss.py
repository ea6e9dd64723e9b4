"""Clipped loss and importance weights: by hand, against loops, and the edges of every bound."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prorl_nemo.algorithms.policy_loss import Method, clipped_policy_loss, importance_weights

LOW, HIGH = 0.2, 0.28


def at_ratio(ratio: float, advantage: float, dual_clip: float | None = None) -> list[float]:
    """(loss, gradient of the log-probability, clipped low, clipped high) of one token."""
    old = torch.tensor([-2.0], dtype=torch.float64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    result = clipped_policy_loss(
        logprobs, old, torch.tensor([advantage], dtype=torch.float64), LOW, HIGH, dual_clip
    )
    result.per_token.sum().backward()
    assert logprobs.grad is not None
    flags = [float(result.clipped_low), float(result.clipped_high)]
    assert result.ratio.item() == pytest.approx(ratio, rel=1e-12)
    return [result.per_token.item(), logprobs.grad.item(), *flags]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, [-2.0, -2.0, 0, 0]),
        (1.2, 2.0, [-2.4, -2.4, 0, 0]),
        (1.5, 2.0, [-2.56, 0.0, 0, 1]),
        (0.5, 2.0, [-1.0, -1.0, 0, 0]),
        (1.5, -2.0, [3.0, 3.0, 0, 0]),
        (0.9, -2.0, [1.8, 1.8, 0, 0]),
        (0.5, -2.0, [1.6, 0.0, 1, 0]),
        (5.0, 0.0, [0.0, 0.0, 0, 0]),
        (0.5, 0.0, [0.0, 0.0, 0, 0]),
        (0.5, 0.3, [-0.15, -0.15, 0, 0]),
    ],
)
def test_by_hand(ratio: float, advantage: float, expected: list[float]) -> None:
    """Each side of each bound: value, gradient and which bound removed it."""
    # float64 exp and log of numbers near 1.
    assert at_ratio(ratio, advantage) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (4.0, -2.0, [6.0, 0.0, 0, 0]),
        (2.9, -2.0, [5.8, 5.8, 0, 0]),
        (4.0, 2.0, [-2.56, 0.0, 0, 1]),
    ],
)
def test_dual_clip(ratio: float, advantage: float, expected: list[float]) -> None:
    """c = 3 ends the loss of a negative advantage at 3|A| and touches nothing else."""
    assert at_ratio(ratio, advantage, dual_clip=3.0) == pytest.approx(expected, abs=1e-12)


tokens = st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=16)


@settings(max_examples=60, deadline=None)
@given(tokens, st.sampled_from([None, 1.5, 3.0]))
def test_against_the_textbook_formula(
    batch: list[tuple[float, float]], dual_clip: float | None
) -> None:
    """max(-A r, -A clip(r)), then min with -A c for negative A; one token at a time."""
    found = clipped_policy_loss(
        torch.tensor([b[0] for b in batch], dtype=torch.float64),
        torch.zeros(len(batch), dtype=torch.float64),
        torch.tensor([b[1] for b in batch], dtype=torch.float64),
        LOW,
        HIGH,
        dual_clip,
    )
    for i, (log_ratio, advantage) in enumerate(batch):
        ratio = math.exp(log_ratio)
        clipped = min(max(ratio, 1 - LOW), 1 + HIGH)
        loss = max(-advantage * ratio, -advantage * clipped)
        if dual_clip and advantage < 0:
            loss = min(loss, -advantage * dual_clip)
        # The same operations in float64.
        assert found.per_token[i].item() == pytest.approx(loss, rel=1e-12, abs=1e-300)


def test_on_policy_gradient_is_minus_advantage() -> None:
    """At ratio 1 the loss is REINFORCE: no tie between the branches may halve the gradient."""
    old = torch.randn(64, generator=torch.Generator().manual_seed(0))
    logprobs = old.clone().requires_grad_()
    advantages = torch.linspace(-2, 2, 64)
    result = clipped_policy_loss(logprobs, old, advantages, LOW, HIGH, dual_clip=3.0)
    result.per_token.sum().backward()
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad, -advantages)
    assert not result.clipped_low.any()
    assert not result.clipped_high.any()


def test_extreme_ratios_stay_finite() -> None:
    logprobs = torch.tensor([0.0, -500.0, 0.0, -500.0], requires_grad=True)
    old = torch.tensor([-500.0, 0.0, -500.0, 0.0])
    result = clipped_policy_loss(logprobs, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), LOW, HIGH)
    result.per_token.sum().backward()
    assert logprobs.grad is not None
    assert torch.isfinite(result.per_token).all()
    assert torch.isfinite(logprobs.grad).all()
    # Beyond +-20 the log-ratio is constant, so no such token may move the policy.
    assert logprobs.grad.tolist() == [0.0] * 4
    assert result.ratio[0].item() == pytest.approx(math.exp(20.0), rel=1e-6)


def test_only_the_policy_gets_a_gradient() -> None:
    leaves = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    result = clipped_policy_loss(leaves[0], leaves[1], leaves[2], LOW, HIGH)
    result.per_token.sum().backward()
    assert leaves[1].grad is None
    assert leaves[2].grad is None
    assert not result.ratio.requires_grad


def weights_of(rho: list[float], method: Method, low: float, high: float) -> tuple[Tensor, float]:
    """Weights of tokens with the given rho, each a response of its own."""
    old = torch.tensor([math.log(r) for r in rho], requires_grad=True)
    found = importance_weights(
        old, torch.zeros(len(rho)), torch.arange(len(rho)), method, low, high
    )
    assert not found.weights.requires_grad
    return found.weights, found.out_of_bounds_share


def test_icepop_bounds_are_inclusive() -> None:
    weights, share = weights_of([0.49, 0.5, 1.0, 5.0, 5.01], "icepop", 0.5, 5.0)
    # float32 exp and log.
    assert weights.tolist() == pytest.approx([0.0, 0.5, 1.0, 5.0, 0.0], rel=1e-6)
    assert share == pytest.approx(0.4)


def test_whatever_the_bounds_are_they_are_inclusive() -> None:
    """exp(log(bound)) in float32 lands on either side of it: half of these would be lost."""
    for bound in range(2, 60):
        _, share = weights_of([1 / bound, float(bound)], "icepop", 1 / bound, float(bound))
        assert share == 0.0, bound


def test_tis_truncates() -> None:
    weights, share = weights_of([0.1, 0.5, 1.5, 9.0], "tis", 0.5, 2.0)
    assert weights.tolist() == pytest.approx([0.5, 0.5, 1.5, 2.0], rel=1e-6)
    assert share == pytest.approx(0.5)
    weights, share = weights_of([1e-4, 1.0, 9.0, 1.0], "tis", 0.0, 2.0)
    assert weights.tolist() == pytest.approx([1e-4, 1.0, 2.0, 1.0], rel=1e-6)
    assert share == 0.25


def test_none_weighs_nothing_but_counts() -> None:
    weights, share = weights_of([0.1, 1.0, 9.0, 1.0], "none", 0.5, 5.0)
    assert weights.tolist() == [1.0] * 4
    assert share == 0.5


def test_sequence_mask_by_hand() -> None:
    """Response 3: rho 4 and 1/4, geometric mean 1, kept raw. Response 8: 1.1 and 1.1, dropped."""
    rho = torch.tensor([4.0, 1.1, 0.25, 1.1], dtype=torch.float64)
    found = importance_weights(
        rho.log(), torch.zeros(4).double(), torch.tensor([3, 8, 3, 8]), "seq-mask-tis", 0.999, 1.002
    )
    assert found.weights.tolist() == pytest.approx([4.0, 0.0, 0.25, 0.0], rel=1e-12)
    assert found.out_of_bounds_share == 0.5


def test_sequence_bounds_are_inclusive() -> None:
    """Up to the rounding of the mean, so in float64 and with one token per response."""
    old = torch.tensor([math.log(r) for r in (0.49, 0.5, 5.0, 5.01)], dtype=torch.float64)
    found = importance_weights(
        old, torch.zeros(4).double(), torch.arange(4), "seq-mask-tis", 0.5, 5.0
    )
    assert found.weights.tolist() == pytest.approx([0.0, 0.5, 5.0, 0.0], rel=1e-12)
    assert found.out_of_bounds_share == 0.5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 3)), min_size=1, max_size=20),
    st.sampled_from(["none", "tis", "icepop", "seq-mask-tis"]),
)
def test_weights_against_slow_reference(batch: list[tuple[float, int]], method: Method) -> None:
    low, high = 0.8, 1.3
    expected, outside = [], []
    for log_rho, sequence in batch:
        rho = math.exp(log_rho)
        own = [x for x, s in batch if s == sequence]
        g = math.exp(math.fsum(own) / len(own))
        keep = low <= (g if method == "seq-mask-tis" else rho) <= high
        outside.append(not keep)
        if method == "none":
            expected.append(1.0)
        elif method == "tis":
            expected.append(min(max(rho, low), high))
        else:
            expected.append(rho if keep else 0.0)
    engine = -torch.arange(len(batch), dtype=torch.float64) / 8 - 1 / 3
    found = importance_weights(
        engine + torch.tensor([b[0] for b in batch], dtype=torch.float64),
        engine,
        torch.tensor([b[1] for b in batch]),
        method,
        low,
        high,
    )
    # The same operations in float64, on a difference that is rounded once more.
    assert found.weights.tolist() == pytest.approx(expected, rel=1e-12)
    if method == "seq-mask-tis":
        verdicts = dict(zip([b[1] for b in batch], outside, strict=True))
        outside = list(verdicts.values())
    assert found.out_of_bounds_share == pytest.approx(sum(outside) / len(outside))


def test_runaway_ratio_is_finite() -> None:
    for method in ("none", "tis", "icepop", "seq-mask-tis"):
        found = importance_weights(
            torch.tensor([0.0, 0.0]),
            torch.tensor([-300.0, 300.0]),
            torch.tensor([0, 0]),
            method,
            0.5,
            5.0,
        )
        assert torch.isfinite(found.weights).all()


def test_masked_tokens_stay_in_the_denominator() -> None:
    """The documented batch loss: a token that IcePop masks still counts as one."""
    rho = importance_weights(
        torch.tensor([0.0, 3.0]), torch.zeros(2), torch.tensor([0, 0]), "icepop", 0.5, 5.0
    )
    loss = clipped_policy_loss(torch.zeros(2), torch.zeros(2), torch.ones(2), LOW, HIGH)
    assert (rho.weights * loss.per_token).sum().item() / 2 == -0.5


def test_refusals() -> None:
    good, index = torch.zeros(3), torch.arange(3)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            importance_weights(good, good + bad, index, "icepop", 0.5, 5.0)
    with pytest.raises(ValueError, match="at least one token"):
        importance_weights(good[:0], good[:0], index[:0], "icepop", 0.5, 5.0)
    with pytest.raises(ValueError, match="low < high"):
        importance_weights(good, good, index, "icepop", 5.0, 0.5)
    with pytest.raises(ValueError, match="method"):
        importance_weights(good, good, index, "pop", 0.5, 5.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bfloat16"):
        clipped_policy_loss(good.bfloat16(), good, good, LOW, HIGH)
    with pytest.raises(ValueError, match="one shape"):
        clipped_policy_loss(good, good, good[:, None], LOW, HIGH)
    with pytest.raises(ValueError, match="dual_clip"):
        clipped_policy_loss(good, good, good, LOW, HIGH, dual_clip=0.5)
