"""What is usual for a figure: by hand, against numpy, and how often chance and faults are told."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from prorl_nemo.schedule.collapse import CollapseWatch
from prorl_nemo.schedule.mismatch_watch import MismatchWatch
from prorl_nemo.schedule.usual import Usual, UsualRange


def taken(values: list[float], window: int = 5, enough: int = 3) -> UsualRange:
    found = UsualRange(window, enough)
    for value in values:
        found.take("x", value, beyond=False)
    return found


def test_median_and_spread_by_hand() -> None:
    assert taken([1.0, 2.0]).of("x") is None
    # Of 9, 1, 2, 4, 8 the median is 4; the distances are 5, 3, 2, 0, 4, their median 3.
    found = taken([77.0, 9.0, 1.0, 2.0, 4.0, 8.0]).of("x")
    assert found == Usual(4.0, pytest.approx(3 * 1.4826))
    assert taken([]).of("never seen") is None


def test_the_spread_is_the_standard_deviation_of_normal_values() -> None:
    """And is not widened by a tenth of values far out."""
    rng = np.random.default_rng(0)
    values = rng.normal(10, 2, 20_000)
    found = taken(list(values), window=20_000).of("x")
    # The error of this estimate is about 1.17 / sqrt(n), 0.8 %, and three times that.
    assert found is not None and found.spread == pytest.approx(2, rel=0.025)
    values[::10] = 1e6
    found = taken(list(values), window=20_000).of("x")
    assert found is not None and found.spread < 2.5


def test_limits_by_hand() -> None:
    calm, wild = Usual(1.0, 0.1), Usual(1.0, 0.5)
    assert calm.most(2.0) == 2.0
    assert calm.most(2.0, floor=7.0) == 7.0
    assert wild.most(2.0) == 3.0
    assert calm.least(0.4) == pytest.approx(0.4)
    assert wild.least(0.4) == pytest.approx(1 / 3)  # As `most` is three times the median.
    assert Usual(0.0, 0.0).least(0.4) == 0.0


def test_only_the_second_in_a_row_counts() -> None:
    found = UsualRange(5, 1)
    heard = [found.take("x", 1.0, beyond) for beyond in (True, False, True, True, True, False)]
    assert heard == [False, False, False, True, True, False]


def test_the_values_before_a_streak() -> None:
    found = taken([1.0, 2.0, 3.0, 4.0])
    assert found.before("x", 3) == [2.0, 3.0, 4.0]
    for value in (50.0, 60.0):
        found.take("x", value, beyond=True)
    assert found.before("x", 3) == [2.0, 3.0, 4.0]
    for _ in range(9):  # Longer than the window: no value before it is known any more.
        found.take("x", 70.0, beyond=True)
    assert found.before("x", 3) == []


def test_state_survives_json() -> None:
    rng = random.Random(0)
    found = UsualRange(4, 2)
    for _ in range(9):
        found.take("x", rng.random(), rng.random() < 0.5)
        again = UsualRange(4, 2)
        again.load_state_dict(json.loads(json.dumps(found.state_dict())))
        assert again.state_dict() == found.state_dict()
        assert again.of("x") == found.of("x")
        found = again
    found.clear()
    assert found.of("x") is None and found.before("x", 3) == []


def figures(rng: random.Random, factor: float) -> dict[str, float]:
    """Those of a small batch: entropy and mismatch vary by a third, as in the study's main run
    (log-normal; the mean square of the difference twice as much as the mean)."""
    mean = 0.004 * factor * rng.lognormvariate(0, 0.35)
    return {
        "mismatch/mean_abs": mean,
        "mismatch/p99": 25 * mean * rng.lognormvariate(0, 0.2),
        "mismatch/gen_kl": 10 * mean**2 * rng.lognormvariate(0, 0.2),
        "policy/entropy": 0.2 * rng.lognormvariate(0, 0.35) / factor,
    }


def test_chance_is_seldom_told_and_a_fault_always() -> None:
    rng = random.Random(0)
    mismatch, collapse = MismatchWatch(), CollapseWatch()
    told = 0
    for step in range(3000):
        row = figures(rng, 1.0)
        told += (mismatch.observe(step, row) is not None) + len(collapse.observe(step, row))
    # With neither spread nor repetition it is more than 150.
    assert told <= 15
    for trial in range(50):
        mismatch, collapse = MismatchWatch(), CollapseWatch()
        for step in range(30):
            mismatch.observe(step, figures(rng, 1.0))
            collapse.observe(step, figures(rng, 1.0))
        # Neither has warned in the steps before, or it would be silent now.
        mismatch._warned, collapse._warned = None, {}
        broken = [figures(rng, 10.0) for _ in range(2)]
        told_mismatch = [mismatch.observe(30 + k, row) for k, row in enumerate(broken)]
        told_collapse = [collapse.observe(30 + k, row) for k, row in enumerate(broken)]
        assert any(told_mismatch), trial
        assert any(told_collapse), trial
