"""Learning rates: by hand, and against torch's own schedulers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from prorl_nemo.schedule.learning_rate import Schedule, learning_rate


def rates(total: int, **options: Any) -> list[float]:
    return [
        learning_rate(step, peak=2e-6, total_steps=total, **options) for step in range(1, total + 1)
    ]


def test_constant() -> None:
    assert rates(5) == [2e-6] * 5
    # The floor is for decay; a stage may run at a constant rate below it.
    assert rates(2, floor=1e-5) == [2e-6] * 2


def test_warmup_by_hand() -> None:
    expected = [0.5e-6, 1e-6, 1.5e-6, 2e-6, 2e-6, 2e-6]
    assert rates(6, warmup_steps=4) == pytest.approx(expected, rel=1e-12)
    assert rates(2, warmup_steps=4) == pytest.approx(expected[:2], rel=1e-12)


def test_decay_by_hand() -> None:
    found = rates(5, schedule="linear", warmup_steps=1)
    assert found == pytest.approx([2e-6, 2e-6, 1.5e-6, 1e-6, 0.5e-6], rel=1e-12)
    found = rates(4, schedule="cosine", floor=1e-6)
    weights = [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert found == pytest.approx([1e-6 * (1 + w) for w in weights], rel=1e-12)


def test_inverse_sqrt_by_hand() -> None:
    # Warm-up 1/4, 2/4, 3/4, 4/4; then 2 / sqrt(step), and the floor at half the peak.
    found = rates(20, schedule="inverse_sqrt", warmup_steps=4, floor=1e-6)
    assert found[:4] == pytest.approx([0.5e-6, 1e-6, 1.5e-6, 2e-6], rel=1e-12)
    assert found[8] == pytest.approx(2e-6 * 2 / 3, rel=1e-12)
    assert found[15:] == pytest.approx([1e-6] * 5, rel=1e-12)
    assert rates(4, schedule="inverse_sqrt")[3] == pytest.approx(1e-6, rel=1e-12)


def test_wsd_by_hand() -> None:
    found = rates(8, schedule="wsd", warmup_steps=2, decay_steps=4)
    expected = [1e-6, 2e-6, 2e-6, 2e-6, 2e-6, 1.5e-6, 1e-6, 0.5e-6]
    assert found == pytest.approx(expected, rel=1e-12)
    # All that is left after the warm-up, where the decay is longer than that.
    assert rates(5, schedule="wsd", warmup_steps=1, decay_steps=9) == pytest.approx(
        rates(5, schedule="linear", warmup_steps=1), rel=1e-12
    )
    assert rates(5, schedule="wsd") == [2e-6] * 5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_floor_at_the_peak_is_constant(schedule: Schedule) -> None:
    assert rates(5, schedule=schedule, floor=2e-6) == [2e-6] * 5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_against_torch(schedule: Schedule) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-6)
    reference: Any = (
        LinearLR(optimizer, 1.0, 0.1, total_iters=50)
        if schedule == "linear"
        else CosineAnnealingLR(optimizer, T_max=50, eta_min=2e-7)
    )
    for rate in rates(50, schedule=schedule, floor=2e-7):
        # torch multiplies its way along, so its error grows with the step.
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse_sqrt", "wsd"])
def test_no_step_is_spent_at_rate_zero(schedule: Schedule) -> None:
    for total in (1, 2, 7):
        for warmup in (0, 1, 3, 7):
            assert min(rates(total, schedule=schedule, warmup_steps=warmup, decay_steps=3)) > 0


def test_refusals() -> None:
    for step in (0, 11):
        with pytest.raises(ValueError, match="outside"):
            learning_rate(step, peak=1.0, total_steps=10)
    with pytest.raises(ValueError, match="floor"):
        learning_rate(1, peak=1.0, total_steps=10, schedule="cosine", floor=2.0)
    with pytest.raises(ValueError, match="schedule"):
        learning_rate(1, peak=1.0, total_steps=1, schedule="step")  # type: ignore[arg-type]
