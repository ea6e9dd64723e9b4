"""Advantages: vectors known to four digits, and a plain Python reference on random batches."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prorl_nemo.algorithms.advantages import grpo, reinforce_plus_plus_baseline

REWARDS = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0])
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
LENGTHS = torch.tensor([2, 3, 4, 3, 1, 2, 2, 5])

# The vectors are printed with four digits.
FOUR_DIGITS = 5.1e-5

Statistics = Literal["token", "sequence"]
Variance = Literal["population", "bessel"]


@pytest.mark.parametrize(
    ("statistics", "variance", "expected"),
    [
        ("token", "population", [2.0520, *[-0.2052] * 3, *[0.9234] * 3, -1.3338]),
        ("token", "bessel", [2.0048, *[-0.2005] * 3, *[0.9022] * 3, -1.3031]),
        ("sequence", "population", [1.7321, *[-0.5774] * 3, *[0.5774] * 3, -1.7321]),
    ],
)
def test_vectors(statistics: Statistics, variance: Variance, expected: list[float]) -> None:
    advantages = reinforce_plus_plus_baseline(REWARDS, GROUPS, LENGTHS, statistics, variance)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == pytest.approx(expected, abs=FOUR_DIGITS)


def test_constant_group_gets_the_batch_mean_under_token_statistics() -> None:
    """Why groups without variance must be dropped: they get +0.28, and change the others."""
    rewards = torch.cat([REWARDS, torch.ones(4)])
    groups = torch.cat([GROUPS, torch.full((4,), 2)])
    lengths = torch.cat([LENGTHS, torch.full((4,), 3)])
    advantages = reinforce_plus_plus_baseline(rewards, groups, lengths)
    expected = [2.3407, *[-0.4036] * 3, *[0.9686] * 3, -1.7757, *[0.2825] * 4]
    assert advantages.tolist() == pytest.approx(expected, abs=FOUR_DIGITS)


def test_by_hand() -> None:
    """Scores 1, 0 with 1 and 3 tokens: centred +-1/2, token mean -1/4, variance 3/16."""
    advantages = reinforce_plus_plus_baseline(
        torch.tensor([1.0, 0.0]), torch.tensor([7, 7]), torch.tensor([1, 3])
    )
    # Exact arithmetic; only the float32 result rounds.
    assert advantages.tolist() == pytest.approx([math.sqrt(3), -math.sqrt(1 / 3)], rel=1e-6)


def slow_reference(
    rewards: list[float],
    groups: list[int],
    lengths: list[int],
    statistics: Statistics,
    variance: Variance,
) -> list[float]:
    """Token by token, as a loop over a flat list."""
    centred = []
    for reward, group in zip(rewards, groups, strict=True):
        own = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        centred.append(reward - math.fsum(own) / len(own))
    flat = []
    for value, length in zip(centred, lengths, strict=True):
        flat += [value] * (length if statistics == "token" else 1)
    mean = math.fsum(flat) / len(flat)
    squares = math.fsum((value - mean) ** 2 for value in flat)
    spread = squares / (len(flat) if variance == "population" else max(len(flat) - 1, 1))
    return [(value - mean) / math.sqrt(max(spread, 1e-8)) for value in centred]


rows = st.lists(
    st.tuples(st.integers(0, 4).map(lambda k: k / 4), st.integers(-2, 2), st.integers(1, 40)),
    min_size=1,
    max_size=24,
)


@settings(max_examples=60, deadline=None)
@given(rows, st.sampled_from(["token", "sequence"]), st.sampled_from(["population", "bessel"]))
def test_against_slow_reference(
    batch: list[tuple[float, int, int]], statistics: Statistics, variance: Variance
) -> None:
    """Groups of unequal size, in any order, with any ids."""
    rewards, groups, lengths = (list(column) for column in zip(*batch, strict=True))
    found = reinforce_plus_plus_baseline(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(groups),
        torch.tensor(lengths),
        statistics,
        variance,
    )
    expected = slow_reference(rewards, groups, lengths, statistics, variance)
    # float32 output; a std at its floor of 1e-4 enlarges float64 noise to at most 1e-11.
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(rows)
def test_grpo_against_slow_reference(batch: list[tuple[float, int, int]]) -> None:
    rewards, groups, _ = (list(column) for column in zip(*batch, strict=True))
    expected = []
    for reward, group in zip(rewards, groups, strict=True):
        own = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = math.fsum(own) / len(own)
        squares = math.fsum((r - mean) ** 2 for r in own)
        std = math.sqrt(squares / (len(own) - 1)) if len(own) > 1 else 0.0
        expected.append((reward - mean) / (std + 1e-6) if std else 0.0)
    found = grpo(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups))
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_grpo_by_hand() -> None:
    """[1, 0, 0, 0]: mean 1/4, N - 1 std 1/2."""
    found = grpo(REWARDS[:4], GROUPS[:4])
    # eps = 1e-6 against a std of 0.5 changes the sixth digit.
    assert found.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=3e-6)


@pytest.mark.parametrize("score", [0.0, 1.0, 1 / 3, 0.1])
@pytest.mark.parametrize("size", [1, 3, 10])
def test_grpo_constant_group_is_exactly_zero(score: float, size: int) -> None:
    """Also for thirds and tenths, whose mean rounds; a tiny eps would return large numbers."""
    rewards = torch.full((size,), score)
    noisy = rewards.double() + 1e-9 * torch.arange(size)
    for values in (rewards, rewards.double(), noisy):
        assert grpo(values, torch.zeros(size).long(), eps=1e-9).tolist() == [0.0] * size


def test_lone_response_is_no_nan() -> None:
    one = torch.tensor([0.5])
    for variance in ("population", "bessel"):
        found = reinforce_plus_plus_baseline(
            one, torch.tensor([0]), torch.tensor([1]), variance=variance
        )
        assert found.tolist() == [0.0]


def test_the_floor_by_hand() -> None:
    """Centred rewards of 1e-5 have the variance 1e-10: the floor of 1e-8 takes its place."""
    rewards = torch.tensor([0.0, 2e-5], dtype=torch.float64)
    found = reinforce_plus_plus_baseline(rewards, torch.tensor([3, 3]), torch.tensor([4, 4]))
    assert found.tolist() == pytest.approx([-0.1, 0.1], rel=1e-6)


def test_scale_and_shift_of_rewards_do_not_matter() -> None:
    """0/1 and -1/1 rewards train alike, as the ProRL v2 page claims."""
    a = reinforce_plus_plus_baseline(REWARDS, GROUPS, LENGTHS)
    b = reinforce_plus_plus_baseline(2 * REWARDS - 1, GROUPS, LENGTHS)
    # The same float64 numbers up to a power of two.
    assert torch.allclose(a, b, rtol=1e-6, atol=0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="one shape"):
        reinforce_plus_plus_baseline(REWARDS[:, None], GROUPS, LENGTHS)
    with pytest.raises(ValueError, match="one shape"):
        grpo(REWARDS[:, None], GROUPS)
    with pytest.raises(ValueError, match="at least one token"):
        reinforce_plus_plus_baseline(REWARDS, GROUPS, LENGTHS * 0)
    with pytest.raises(ValueError, match="finite"):
        reinforce_plus_plus_baseline(REWARDS * math.nan, GROUPS, LENGTHS)
    with pytest.raises(ValueError, match="non-empty"):
        grpo(REWARDS[:0], GROUPS[:0])
    with pytest.raises(ValueError, match="unknown"):
        reinforce_plus_plus_baseline(REWARDS, GROUPS, LENGTHS, "tokens")  # type: ignore[arg-type]
