"""Evaluation's estimators against hand cases and brute force over all subsets."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.consensus import cons_at_k
from prorl_nemo.evaluation.estimators import (
    Outcome,
    average,
    group_means,
    item_means,
    outcome_shares,
    pass_at_k,
    pass_curve,
)
from prorl_nemo.evaluation.resampling import bootstrap_interval, paired_test

EXACT = 1e-12  # doubles through a few hundred operations


def test_average_by_hand() -> None:
    # Item means 1/2 and 1; their variance 1/8 over 2 items; within: (1/2 + 0) / 2 over 2 x 2.
    figures = average([[1, 0], [1, 1]])
    assert figures.mean == 0.75
    assert figures.error_items == pytest.approx(math.sqrt((1 / 8) / 2), abs=EXACT)
    assert figures.error_samples == pytest.approx(math.sqrt(0.25 / 2 / 2), abs=EXACT)
    assert (figures.items, figures.samples) == (2, 2)
    assert average([[1.0, 0.0]]).error_items is None
    assert average([[1.0], [0.0]]).error_samples is None


def test_standard_errors_are_what_repetition_shows() -> None:
    """Both claims simulated: new samples of the same items, and new items each time."""
    rng = np.random.default_rng(5)
    chances = rng.beta(0.6, 0.8, size=40)
    fixed, redrawn, said_samples, said_items = [], [], [], []
    for _ in range(1500):
        same = average((rng.random((40, 4)) < chances[:, None]).astype(float).tolist())
        other = rng.beta(0.6, 0.8, size=40)
        new = average((rng.random((40, 4)) < other[:, None]).astype(float).tolist())
        fixed.append(same.mean)
        redrawn.append(new.mean)
        said_samples.append(same.error_samples or 0)
        said_items.append(new.error_items or 0)
    # The standard deviation of 1,500 draws is known to 1.8 %; four of those.
    assert np.std(fixed) == pytest.approx(np.mean(said_samples), rel=0.075)
    assert np.std(redrawn) == pytest.approx(np.mean(said_items), rel=0.075)


def test_order_of_items_and_samples_changes_no_digit() -> None:
    shuffler = random.Random(3)
    scores = [[shuffler.random() for _ in range(7)] for _ in range(101)]
    other = [shuffler.sample(row, 7) for row in scores]
    shuffler.shuffle(other)
    assert average(scores) == average(other)
    assert bootstrap_interval(item_means(scores)) == bootstrap_interval(item_means(other))


@pytest.mark.parametrize(
    "scores", [[], [[]], [[1, 0], [1]], [[1.5]], [[-0.1]], [[float("nan")]]], ids=str
)
def test_scores_that_would_mislead_are_refused(scores: list[list[float]]) -> None:
    with pytest.raises(ValueError):
        average(scores)


def test_group_means() -> None:
    assert group_means(["b", "a", "b", "b"], [0.0, 1.0, 0.0, 1.0]) == {"a": 1.0, "b": 1 / 3}
    with pytest.raises(ValueError):
        group_means(["a"], [1.0, 0.0])


def test_pass_at_k_by_hand() -> None:
    # n = 4, c = 1: 1 - C(3,k)/C(4,k) = k/4. Partial credit is not a pass.
    assert pass_at_k([[1, 0, 0.5, 0]])[0] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=EXACT)
    assert pass_curve([[1, 1], [0, 0]]) == [0.5, 0.5]


def test_pass_at_k_is_the_mean_over_all_subsets() -> None:
    rng = random.Random(1)
    for _ in range(30):
        n = rng.randint(1, 8)
        row = [float(rng.random() < 0.3) for _ in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(row, k))
            slow = Fraction(sum(1.0 in subset for subset in subsets), len(subsets))
            assert pass_at_k([row])[0, k - 1] == pytest.approx(float(slow), abs=EXACT)


def test_pass_at_k_where_binomials_overflow() -> None:
    n, c = 4096, 3
    row = [1.0] * c + [0.0] * (n - c)
    curve = pass_at_k([row])[0]
    for k in (1, 2, 1000, 4000, 4093, 4094, 4096):
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        # 4,096 factors, each rounded to 2^-53.
        assert curve[k - 1] == pytest.approx(float(exact), abs=1e-11)
    assert bool((np.diff(curve) >= 0).all())


def slow_cons(answers: list[str | None], right: list[bool], k: int) -> Fraction:
    """All subsets, one by one."""
    verdicts = {a: r for a, r in zip(answers, right) if a is not None}
    total, subsets = Fraction(0), list(itertools.combinations(answers, k))
    for subset in subsets:
        votes = Counter(a for a in subset if a is not None)
        top = [a for a in votes if votes[a] == max(votes.values())]
        if top:
            total += Fraction(sum(verdicts[a] for a in top), len(top))
    return total / len(subsets)


def test_cons_at_k_by_hand() -> None:
    answers, right = ["7", "7", "8", None], [True, True, False, False]
    assert cons_at_k(answers, right, 4) == 1.0
    assert cons_at_k(answers, right, 1) == 0.5
    # Pairs: 77 wins; 78 twice a tie; 7- twice wins; 8- loses: (1 + 2/2 + 2) / 6.
    assert cons_at_k(answers, right, 2) == pytest.approx(4 / 6, abs=EXACT)
    assert cons_at_k([None, None], [False, False], 2) == 0.0


def test_cons_at_k_is_the_mean_over_all_subsets() -> None:
    rng = random.Random(2)
    for _ in range(60):
        n = rng.randint(1, 8)
        answers = [rng.choice(["a", "b", "c", "d", None]) for _ in range(n)]
        true = {"a"} if rng.random() < 0.7 else {"a", "c"}
        right = [answer in true for answer in answers]
        for k in range(1, n + 1):
            slow = float(slow_cons(answers, right, k))
            assert cons_at_k(answers, right, k) == pytest.approx(slow, abs=EXACT)


def test_cons_at_k_of_many_samples() -> None:
    answers: list[str | None] = ["a"] * 100 + ["b"] * 90 + ["c"] * 66
    right = [answer == "a" for answer in answers]
    assert cons_at_k(answers, right, 256) == 1.0
    assert cons_at_k(answers, right, 1) == pytest.approx(100 / 256, abs=EXACT)
    rng = random.Random(0)
    draws = 20_000
    wins = 0.0
    for _ in range(draws):
        votes = Counter(rng.sample(answers, 33))
        top = [a for a in votes if votes[a] == max(votes.values())]
        wins += ("a" in top) / len(top)
    # Four standard errors of a share of 20,000 draws.
    assert cons_at_k(answers, right, 33) == pytest.approx(wins / draws, abs=4 * 0.5 / draws**0.5)


@pytest.mark.parametrize(
    ("answers", "right", "k"),
    [(["a"], [True], 2), (["a"], [True], 0), (["a", "a"], [True, False], 1), (["a"], [], 1)],
)
def test_cons_at_k_refuses(answers: list[str | None], right: list[bool], k: int) -> None:
    with pytest.raises(ValueError):
        cons_at_k(answers, right, k)


def test_bootstrap_against_all_resamples() -> None:
    """Three items have 27 resamples; the seeded quantiles are those of the full list."""
    values = [0.0, 0.25, 1.0]
    every = sorted(sum(draw) / 3 for draw in itertools.product(values, repeat=3))
    interval = bootstrap_interval(values, level=0.5, resamples=40_000, seed=1)
    # Inner quartiles of a distribution with steps: the step they fall on, rounding aside.
    assert interval.low == pytest.approx(every[len(every) // 4], abs=EXACT)
    assert interval.high == pytest.approx(every[3 * len(every) // 4], abs=EXACT)
    assert bootstrap_interval([0.3]).low == bootstrap_interval([0.3]).high == 0.3


def test_bootstrap_is_seeded_and_close_to_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(400).tolist()
    interval = bootstrap_interval(values, seed=7)
    assert interval == bootstrap_interval(values, seed=7)
    assert interval != bootstrap_interval(values, seed=8)
    error = np.std(values, ddof=1) / 20
    # A bootstrap quantile of 10,000 is within 3 % of an error bar here.
    assert interval.low == pytest.approx(np.mean(values) - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(np.mean(values) + 1.96 * error, abs=0.1 * error)


@pytest.mark.parametrize("values", [[], [float("nan")], [math.inf]], ids=str)
def test_bootstrap_refuses(values: list[float]) -> None:
    with pytest.raises(ValueError):
        bootstrap_interval(values)
    with pytest.raises(ValueError):
        bootstrap_interval([0.5], level=1.0)


def test_paired_test_by_hand() -> None:
    # Differences 1, 1, 1, 0: three coins, all heads or all tails: 2 of 8.
    a = {"w": [1.0], "x": [1.0], "y": [1.0], "z": [0.0, 1.0]}
    b = {"w": [0.0, 0.0], "x": [0.0, 0.0], "y": [0.0, 0.0], "z": [0.5, 0.5]}
    with pytest.raises(ValueError):
        paired_test(a, b)
    a["w"], a["x"], a["y"] = [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]
    found = paired_test(a, b)
    assert found.difference == 0.75
    assert found.p_value == 0.25
    assert found.error == pytest.approx(0.25, abs=EXACT)  # std 1/2 over 4 items
    assert found.interval.low <= 0.75 <= found.interval.high
    assert paired_test(a, a).p_value == 1.0
    with pytest.raises(UserError, match="same items"):
        paired_test(a, {"w": [1.0, 1.0]})


def test_a_drawn_p_value_counts_the_observed_pattern() -> None:
    """Forty differences of 1: of 100 random patterns none is as extreme, the observed one is."""
    a, b = ({str(i): [score] for i in range(40)} for score in (1.0, 0.0))
    assert paired_test(a, b, resamples=100).p_value == pytest.approx(1 / 101, abs=EXACT)


def test_sign_flips_against_all_patterns() -> None:
    rng = random.Random(4)
    for _ in range(20):
        size = rng.randint(1, 9)
        a = {str(i): [rng.random()] for i in range(size)}
        b = {str(i): [rng.random()] for i in range(size)}
        d = [a[i][0] - b[i][0] for i in a]
        sums = [abs(sum(s * x for s, x in zip(signs, d)))
                for signs in itertools.product((1, -1), repeat=size)]  # fmt: skip
        slow = sum(s >= abs(sum(d)) - 1e-9 for s in sums) / len(sums)
        assert paired_test(a, b, resamples=100).p_value == pytest.approx(slow, abs=EXACT)


def test_paired_p_values_are_uniform_without_a_difference() -> None:
    rng = np.random.default_rng(11)
    small = 0
    for _ in range(300):
        a, b = ({str(i): [float(v)] for i, v in enumerate(rng.random(30))} for _ in range(2))
        small += paired_test(a, b, resamples=300).p_value <= 0.1
    # 300 tests at 10 %: 30 on average, standard deviation 5.2; four of those.
    assert 9 <= small <= 51


def test_outcomes_by_hand() -> None:
    shares = outcome_shares(
        [
            Outcome(1.0, "correct", 10, False),
            Outcome(0.5, "broken: x", 20, True),
            Outcome(0.0, r"no answer: no closed \boxed{...}", 30, True),
            Outcome(0.0, "no answer: the box is empty", 5, False),
            Outcome(0.0, "refused: too long", 5, False),
            Outcome(0.0, "wrong: '7'", 10, False),
            Outcome(0.0, "", 0, False),
            Outcome(0.0, "no answers pass", 0, False),
            Outcome(0.0, "not asked: it spells a control token", 0, False),
        ]
    )
    assert (shares.right, shares.partial) == (1 / 9, 1 / 9)
    assert (shares.no_answer, shares.wrong) == (4 / 9, 3 / 9)
    assert (shares.truncated, shares.no_answer_truncated) == (2 / 9, 1 / 9)
    assert shares.tokens == pytest.approx(80 / 9)
    with pytest.raises(ValueError):
        outcome_shares([])
