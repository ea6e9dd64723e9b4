"""Group filter: the traps that peers fall into."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prorl_nemo.algorithms.group_filter import groups_with_variance, has_signal
from prorl_nemo.algorithms.groups import group_mean_and_variance


@pytest.mark.parametrize("scores", [[0, 0, 0], [1, 1, 1, 1], [0.5] * 4, [1 / 3] * 7, [0.1] * 10])
def test_equal_scores_carry_no_signal(scores: list[float]) -> None:
    """All right, all wrong, all half (a test on the mean passes 0.5), and thirds that round."""
    assert not has_signal(scores)
    # Graders may reach the same third by different roundings.
    assert not has_signal([score + 1e-9 * i for i, score in enumerate(scores)])


def test_one_right_answer_keeps_the_whole_group() -> None:
    """Leave-one-out statistics would drop just the correct response of [1, 0, 0, 0]."""
    assert has_signal([1, 0, 0, 0])
    mask = groups_with_variance(
        torch.tensor([1.0, 0.5, 0, 0.5, 0, 0, 0.5]), torch.tensor([4, 9, 4, 9, 4, 4, 9])
    )
    assert mask.tolist() == [True, False, True, False, True, True, False]


def test_lone_response_has_no_variance() -> None:
    assert not has_signal([1.0])


def test_nearly_equal_values_keep_their_variance() -> None:
    """Mean 1000.0001, deviation 1e-4. E[x^2] - E[x]^2 is off by a hundredth here, float32 more."""
    values = torch.tensor([1000.0, 1000.0002], dtype=torch.float64)
    _, variance, size = group_mean_and_variance(values, torch.tensor([7, 7]))
    assert size.tolist() == [2.0, 2.0]
    # Of the 16 digits of a value the first 7 are the mean's.
    assert variance.tolist() == pytest.approx([1e-8, 1e-8], rel=1e-6)


def test_tolerance_by_hand() -> None:
    """[0, d] has the population standard deviation d/2."""
    assert not has_signal([0.0, 1.9e-6])
    assert has_signal([0.0, 2.1e-6])
    assert not has_signal([0.0, 0.2], tolerance=0.11)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3).map(lambda k: k / 3), st.integers(0, 3)),
        min_size=1,
        max_size=20,
    )
)
def test_against_slow_reference(batch: list[tuple[float, int]]) -> None:
    scores, groups = (list(column) for column in zip(*batch, strict=True))
    expected = []
    for group in groups:
        own = [s for s, g in zip(scores, groups, strict=True) if g == group]
        expected.append(statistics.pstdev(own) > 1e-6)
        assert has_signal(own) == expected[-1]
    found = groups_with_variance(torch.tensor(scores, dtype=torch.float64), torch.tensor(groups))
    assert found.tolist() == expected


def test_refusals() -> None:
    """A NaN compares false with everything: the group would vanish without a word."""
    for scores in ([], [0.0, math.nan], [math.inf, 0.0]):
        with pytest.raises(ValueError, match="finite"):
            has_signal(scores)
