"""Reward shaping: the published length table, DAPO's line, and what combinations may not do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prorl_nemo.algorithms.reward_shaping import (
    CosineLength,
    Overlong,
    cosine_length_reward,
    overlong_penalty,
    shape_rewards,
    stop_properly,
)


def test_cosine_table() -> None:
    """eta in [0, 1], limit 8192."""
    lengths = torch.tensor([0, 2048, 4096, 6144, 8192])
    found = cosine_length_reward(lengths, 8192).tolist()
    # Printed with five digits.
    assert found == pytest.approx([1.0, 0.85355, 0.5, 0.14645, 0.0], abs=5.1e-6)


def test_cosine_does_not_rise_again_beyond_the_limit() -> None:
    found = cosine_length_reward(torch.tensor([8192, 9000, 16384]), 8192, -0.5, 2.0)
    assert found.tolist() == pytest.approx([-0.5] * 3, abs=1e-15)


def test_cosine_against_slow_reference() -> None:
    lengths = list(range(0, 130, 7))
    found = cosine_length_reward(torch.tensor(lengths), 100, 0.2, 0.9).tolist()
    for length, value in zip(lengths, found, strict=True):
        # Half-angle form: cos^2(x/2) = (1 + cos x) / 2.
        expected = 0.2 + 0.7 * math.cos(math.pi * min(length / 100, 1.0) / 2) ** 2
        assert value == pytest.approx(expected, abs=1e-15)


def test_overlong_line() -> None:
    """Limit 8192, buffer 2048."""
    lengths = torch.tensor([1, 6144, 7168, 8192, 9000])
    assert overlong_penalty(lengths, 8192, 2048).tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_overlong_against_slow_reference() -> None:
    for length in range(1, 60):
        if length <= 50 - 20:
            expected = 0.0
        elif length <= 50:
            expected = ((50 - 20) - length) / 20
        else:
            expected = -1.0
        assert overlong_penalty(torch.tensor([length]), 50, 20).item() == expected


def test_stop_properly() -> None:
    scores = torch.tensor([1.0, 1.0, 0.4])
    truncated = torch.tensor([True, False, True])
    # float32 multiplication by 0.5 is exact.
    assert stop_properly(scores, truncated, 0.5).tolist() == pytest.approx([0.5, 1.0, 0.2])


def shape(
    score: float,
    length: int,
    *,
    truncated: bool = False,
    factor: float = 0.0,
    overlong: Overlong | None = None,
    cosine: CosineLength | None = None,
) -> float:
    """One response under a limit of 100 tokens."""
    shaped = shape_rewards(
        torch.tensor([score], dtype=torch.float64),
        torch.tensor([length]),
        torch.tensor([truncated]),
        100,
        truncated_factor=factor,
        overlong=overlong,
        cosine=cosine,
    )
    return float(shaped.item())


def test_truncated_correct_response_gets_nothing() -> None:
    """The right text in a box, and then no end: 0, bonus or not."""
    assert shape(1.0, 100, truncated=True) == 0.0
    for correct_only in (True, False):
        bonus = CosineLength(0.1, eta_min=0.5, correct_only=correct_only)
        assert shape(1.0, 100, truncated=True, cosine=bonus) == 0.0
        assert shape(1.0, 10, truncated=True, cosine=bonus) == 0.0
        assert shape(1.0, 100, truncated=True, factor=0.3, cosine=bonus) == 0.3


def test_cosine_for_correct_only_or_for_all() -> None:
    """At half the limit eta is 1/2."""
    only, every = CosineLength(0.1), CosineLength(0.1, correct_only=False)
    assert shape(1.0, 50, cosine=only) == pytest.approx(1.05, abs=1e-15)
    assert shape(1.0 - 1e-7, 50, cosine=only) == pytest.approx(1.05, abs=2e-7)
    assert shape(0.999, 50, cosine=only) == 0.999
    assert shape(0.0, 50, cosine=only) == 0.0
    assert shape(0.0, 50, cosine=every) == pytest.approx(0.05, abs=1e-15)


def test_all_rules_by_hand() -> None:
    """Length 90 of 100, buffer 20: overlong -0.5 * 2; cosine 0.1 * eta(0.9)."""
    overlong, cosine = Overlong(20, weight=2.0), CosineLength(0.1, eta_min=-1.0)
    eta = -1.0 + (1.0 + math.cos(0.9 * math.pi))
    expected = 1.0 - 1.0 + 0.1 * eta
    assert shape(1.0, 90, overlong=overlong, cosine=cosine) == pytest.approx(expected, abs=1e-15)
    # Truncated: 0.5 * score, overlong in full, and the cosine term because it is negative.
    found = shape(1.0, 100, truncated=True, factor=0.5, overlong=overlong, cosine=cosine)
    assert found == pytest.approx(0.5 - 2.0 - 0.1, abs=1e-15)


@settings(max_examples=200, deadline=None)
@given(
    score=st.floats(0, 1),
    length=st.integers(1, 100),
    factor=st.floats(0, 1),
    overlong=st.none() | st.builds(Overlong, st.integers(1, 100), st.floats(0, 3)),
    cosine=st.none()
    | st.builds(
        CosineLength, st.floats(0, 2), st.floats(-1, 0.5), st.floats(0.5, 1), st.booleans()
    ),
)
def test_being_cut_off_never_pays(
    score: float,
    length: int,
    factor: float,
    overlong: Overlong | None,
    cosine: CosineLength | None,
) -> None:
    cut = shape(score, length, truncated=True, factor=factor, overlong=overlong, cosine=cosine)
    finished = shape(score, length, factor=factor, overlong=overlong, cosine=cosine)
    assert cut <= finished


def test_switched_off_shaping_changes_nothing() -> None:
    scores = torch.tensor([0.0, 1 / 3, 1.0], dtype=torch.float64)
    shaped = shape_rewards(scores, torch.tensor([1, 2, 3]), torch.zeros(3).bool(), 4)
    assert torch.equal(shaped, scores)
    assert shaped.dtype == torch.float64


def test_refusals() -> None:
    lengths, finished = torch.tensor([5, 5]), torch.tensor([False, False])
    for scores in ([-1.0, 1.0], [0.0, 1.5], [math.nan, 0.0]):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            shape_rewards(torch.tensor(scores), lengths, finished, 10)
    with pytest.raises(ValueError, match="bool"):
        shape_rewards(torch.zeros(2), lengths, finished.long(), 10)
    with pytest.raises(ValueError, match="one shape"):
        shape_rewards(torch.zeros(2, 1), lengths, finished, 10)
    with pytest.raises(ValueError, match="truncated_factor"):
        shape_rewards(torch.zeros(2), lengths, finished, 10, truncated_factor=1.5)
    with pytest.raises(ValueError, match="buffer"):
        overlong_penalty(lengths, 10, 11)
    with pytest.raises(ValueError, match="eta_min"):
        CosineLength(0.1, eta_min=1.0, eta_max=0.0)
