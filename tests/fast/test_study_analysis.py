"""Intervals, paired differences, pass@k, crossings and verdicts: by hand and by enumeration."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from typing import Any

import pytest

from prorl_nemo.study.analysis import (
    CONTRADICTS,
    Estimate,
    around,
    by_task,
    crossing,
    curve,
    difference,
    estimate,
    pass_at,
    series,
    sure_count,
    verdict,
)


def result(values: dict[int, float], **more: Any) -> dict[str, Any]:
    validation = {"step": list(values), "mean": list(values.values())}
    return {"run": "r", "steps": max(values), "validation": validation | more}


def test_estimate_by_hand() -> None:
    three = estimate([0.1, 0.2, 0.3])
    # Deviation 0.1, so 4.303 * 0.1 / sqrt(3).
    assert three.mean == pytest.approx(0.2)
    assert three.half_width == pytest.approx(0.24843, abs=1e-5)
    assert str(three) == "0.200 ± 0.248"
    assert estimate([0.5]).half_width is None and str(estimate([0.5])) == "0.500"


@pytest.mark.parametrize("runs", [2, 3, 5, 12])
def test_intervals_hold_the_truth_95_times_in_a_hundred(runs: int) -> None:
    rng = random.Random(runs)
    held = 0
    for _ in range(4000):
        found = estimate([rng.gauss(0.4, 0.05) for _ in range(runs)])
        assert found.half_width is not None
        held += abs(found.mean - 0.4) <= found.half_width
    # Four standard errors of a share of 4,000.
    assert held / 4000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


@pytest.mark.parametrize(("runs", "quantile"), [(10, 2.262), (11, 2.228), (31, 2.042)])
def test_intervals_of_many_runs_are_students_too(runs: int, quantile: float) -> None:
    values = [float(value) for value in range(runs)]
    error = statistics.stdev(values) / math.sqrt(runs)
    half_width = estimate(values).half_width
    assert half_width is not None and half_width / error == pytest.approx(quantile, abs=0.003)


def test_an_interval_ends_where_the_figure_does() -> None:
    assert Estimate(0.5, 0.2, 3).within(0.0, 1.0) == pytest.approx((0.3, 0.7))
    assert Estimate(0.5, 4.0, 2).within(0.0, 1.0) == (0.0, 1.0)
    assert Estimate(0.5, None, 1).within(0.0, 1.0) == (0.5, 0.5)


def test_difference_is_paired_by_seed() -> None:
    found = difference({1: 0.5, 2: 0.7, 4: 0.9}, {1: 0.4, 2: 0.6, 3: 0.0})
    assert found is not None and found.runs == 2
    assert found.mean == pytest.approx(0.1) and found.half_width == pytest.approx(0.0, abs=1e-12)
    assert difference({1: 0.5}, {2: 0.5}) is None


def test_around_by_hand() -> None:
    one = result({0: 0.1, 100: 0.2, 200: 0.4, 300: 0.6, 400: 0.8, 500: 1.0})
    assert around(one, 0, "mean") == 0.1
    assert around(one, 200, "mean") == pytest.approx(0.3)  # Not with step 0.
    assert around(one, 450, "mean") == pytest.approx(0.5)
    assert around(one, 500, "mean") == pytest.approx(0.7)
    with pytest.raises(ValueError, match="no validation of pass"):
        around(one, 500, "pass")


def test_curve_by_hand() -> None:
    points = curve([result({0: 0.1, 100: 0.4}), result({0: 0.3})], "mean")
    assert points == [(0, estimate([0.1, 0.3]))]
    assert curve([result({0: 0.1})], "mean") == [(0, Estimate(0.1, None, 1))]
    assert curve([result({0: 0.1, 100: 0.4})], "mean", last=99) == [(0, estimate([0.1]))]


def test_series_leaves_out_what_is_missing() -> None:
    one = {"validation": {"step": [0, 1], "mean": [None, 0.5]}, "train": {"step": [10], "kl": [1]}}
    assert series(one, "mean") == [(1, 0.5)] and series(one, "pass") == []
    assert series(one, "kl", "train") == [(10, 1)]


def test_pass_at_k_is_the_share_of_all_choices() -> None:
    """Of two prompts with 1 and 3 right ones of 6: all ways to choose k of them."""
    for k in (1, 2, 6):
        shares = [
            statistics.fmean(min(choice) < right for choice in itertools.combinations(range(6), k))
            for right in (1, 3)
        ]
        assert pass_at([1, 3], 6, k) == pytest.approx(statistics.fmean(shares))
    assert pass_at([0, 0], 256, 256) == 0.0


@pytest.mark.parametrize(
    ("mean", "half", "expected", "says"),
    [
        (0.2, 0.1, "higher", "as the paper"),
        (-0.2, 0.1, "higher", CONTRADICTS),
        (-0.2, 0.1, "lower", "as the paper"),
        (0.2, 0.1, "lower", CONTRADICTS),
        (0.1, 0.1, "higher", "not decided"),
        (0.2, None, "higher", "one run: not decided"),
        (0.2, 0.0, "higher", "runs agree to the digit: not decided"),
        (5.6e-17, 1e-17, "higher", "runs agree to the digit: not decided"),
        (0.2, 0.1, None, "the paper does not say"),
    ],
)
def test_verdicts(mean: float, half: float | None, expected: str | None, says: str) -> None:
    assert verdict(Estimate(mean, half, 3), expected) == says


def test_crossing_by_hand() -> None:
    before = {"a": 0, "b": 0, "c": 0, "d": 3, "e": 200, "f": 200, "gone": 1}
    after = {"a": 1, "b": 40, "c": 0, "d": 0, "e": 0, "f": 256, "new": 9}
    found = crossing(before, after, 256)
    assert (found.solved, found.solved_surely) == (2, 1)
    assert (found.lost, found.lost_surely) == (2, 1)
    assert (found.never, found.prompts) == (1, 6)


@pytest.mark.parametrize("samples", [4, 8, 9])
def test_sure_count_against_all_arrangements(samples: int) -> None:
    """Of all ways to place c right ones among 2n samples, the share with all in one half."""
    for right in range(1, 5):
        ways = list(itertools.combinations(range(2 * samples), right))
        chance = sum(max(way) < samples for way in ways) / len(ways)
        by_formula = math.comb(samples, right) / math.comb(2 * samples, right)
        assert chance == pytest.approx(by_formula, rel=1e-12)
    count = sure_count(samples)
    if samples == 4:  # All of four on one side are one way of 70: too likely.
        assert count == 5 and crossing({"a": 0}, {"a": 4}, 4).solved_surely == 0
        return
    assert math.comb(samples, count) / math.comb(2 * samples, count) < 0.01
    assert math.comb(samples, count - 1) / math.comb(2 * samples, count - 1) >= 0.01


def test_sure_count_of_256() -> None:
    # 1/2^c, nearly: seven halvings are below one in a hundred, six are not.
    assert sure_count(256) == 7


def test_by_task() -> None:
    counts = {"reasoning_gym/a/held_out-0": 1, "reasoning_gym/a/held_out-1": 2, "x/b/3": 4}
    assert by_task(counts) == {
        "a": {"reasoning_gym/a/held_out-0": 1, "reasoning_gym/a/held_out-1": 2},
        "b": {"x/b/3": 4},
    }
