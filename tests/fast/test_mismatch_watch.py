"""When the mismatch warns, and what it names."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from prorl_nemo.algorithms.mismatch import mismatch_growth
from prorl_nemo.schedule.mismatch_watch import (
    POSITION,
    PRECISION,
    STALE,
    TEMPERATURE,
    MismatchWatch,
)


def row(mean: float, growth: float = 1.5) -> dict[str, float]:
    """A step's figures, as bf16 gives them at the mean 0.02."""
    return {
        "mismatch/mean_abs": mean,
        "mismatch/p99": 6 * mean,
        "mismatch/gen_kl": mean**2,
        "mismatch/out_of_bounds_share": 0.0,
        "mismatch/growth": growth,
    }


def usual(watch: MismatchWatch, steps: int = 20, mean: float = 0.02) -> None:
    rng = random.Random(0)
    for step in range(steps):
        # Noise of a fifth, as between steps of one run.
        assert watch.observe(step, row(mean * rng.uniform(0.8, 1.2))) is None


def test_a_jump_names_the_weights_first() -> None:
    watch = MismatchWatch()
    usual(watch)
    assert watch.observe(20, row(0.09)) is None  # Once may be chance.
    warning = watch.observe(21, row(0.09))
    assert warning is not None
    assert warning.figure == "mismatch/mean_abs"
    # The median of 20 values, 19 of them within a fifth of 0.02.
    assert warning.usual == pytest.approx(0.02, rel=0.1)
    assert warning.limit == pytest.approx(2 * (warning.usual or 0))
    assert warning.causes == [STALE, PRECISION]


def test_growth_with_the_position_names_the_position_first() -> None:
    watch = MismatchWatch()
    usual(watch)
    watch.observe(20, row(0.05, growth=12.0))
    warning = watch.observe(21, row(0.05, growth=12.0))
    assert warning is not None
    assert warning.causes[0] == POSITION


def test_a_fault_from_the_first_step_names_temperature() -> None:
    warning = MismatchWatch().observe(1, row(0.4))
    assert warning is not None
    assert (warning.usual, warning.limit) == (None, 0.1)
    assert warning.causes == [TEMPERATURE, STALE]


def test_a_slow_rise_names_precision_first() -> None:
    watch = MismatchWatch()
    usual(watch)
    warning, step = None, 20
    while warning is None:
        warning = watch.observe(step, row(0.02 * 1.08 ** (step - 19)))
        step += 1
    # By 1.6 (gen_kl, which goes with the square) to 2.2, before the median of 20 steps follows.
    assert 24 <= step <= 31
    assert warning.causes == [PRECISION, STALE]


def test_fp32_rounding_never_warns() -> None:
    """Ten times its median, and still far below anything that matters."""
    watch = MismatchWatch()
    usual(watch, mean=1e-5)
    assert watch.observe(20, row(1e-4)) is None


def test_a_warning_is_not_repeated_at_once_and_survives_a_resume() -> None:
    watch = MismatchWatch(pause=20)
    usual(watch)
    assert watch.observe(20, row(0.2)) is not None
    again = MismatchWatch(pause=20)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    for one in (watch, again):
        # The streak is part of the state: this is the second step of it.
        assert one.observe(40, row(0.09)) is None
        assert one.observe(41, row(0.09)) is not None
    for one in (watch, again):
        assert one.observe(42, row(0.2)) is None


def test_absent_and_broken_figures_are_passed_over() -> None:
    watch = MismatchWatch()
    assert watch.observe(1, {"mismatch/mean_abs": math.nan, "mismatch/p99": "?"}) is None
    assert watch.observe(2, {}) is None
    assert watch.state_dict()["range"]["history"] == {}


def test_a_run_that_is_always_wrong_names_temperature_again() -> None:
    """Longer than what is remembered: no sound step is known any more."""
    watch = MismatchWatch(pause=20)
    heard = [watch.observe(step, row(0.4)) for step in range(1, 60)]
    told = [warning.causes for warning in heard if warning is not None]
    assert told == [[TEMPERATURE, STALE]] * 3


def test_growth_by_hand() -> None:
    """Two responses of four tokens; the last quarter of tokens are the two at position 3."""
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    old = torch.tensor([0.1, 5.0, 5.0, 0.4, 0.3, 5.0, 5.0, 0.8])
    # First quarter: positions 0, and 1, since the third smallest of eight positions is a 1.
    first = (0.1 + 0.3 + 5.0 + 5.0) / 4
    last = (0.4 + 0.8 + 5.0 + 5.0) / 4
    assert mismatch_growth(old, torch.zeros(8), positions) == pytest.approx(last / first, rel=1e-6)


def test_growth_against_a_loop() -> None:
    rng = random.Random(1)
    tokens = [(p, rng.gauss(0, 1 + p / 10)) for n in (40, 25, 90, 60) for p in range(n)]
    ordered = sorted(p for p, _ in tokens)
    low, high = ordered[len(ordered) // 4], ordered[-(len(ordered) // 4) - 1]
    early = [abs(d) for p, d in tokens if p <= low]
    late = [abs(d) for p, d in tokens if p >= high]
    found = mismatch_growth(
        torch.tensor([d for _, d in tokens], dtype=torch.float64),
        torch.zeros(len(tokens), dtype=torch.float64),
        torch.tensor([p for p, _ in tokens]),
    )
    assert found == pytest.approx((sum(late) / len(late)) / (sum(early) / len(early)), rel=1e-12)
    assert found > 2


def test_growth_of_what_cannot_grow() -> None:
    one = torch.tensor([0.5])
    assert mismatch_growth(one, torch.zeros(1), torch.tensor([0])) == 1.0
    same = torch.zeros(12)
    assert mismatch_growth(same, same, torch.arange(12)) == 1.0
