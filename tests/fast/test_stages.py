"""Stages and penalty cycles: every boundary step."""

from __future__ import annotations

from typing import Any

import pytest

from prorl_nemo.schedule.stages import SETTINGS, Stages, penalty_on

DEFAULTS: dict[str, Any] = {
    "max_response_tokens": 8192,
    "samples_per_prompt": 16,
    "learning_rate": 2e-6,
    "temperature": 1.2,
    "clip_low": 0.2,
    "clip_high": 0.28,
}


def three() -> Stages:
    return Stages(
        [
            {"name": "warm", "steps": 3},
            {"steps": 1, "max_response_tokens": 16384, "learning_rate": None},
            {"name": "", "steps": 2, "samples_per_prompt": 32, "clip_high": 0.4},
        ],
        DEFAULTS,
    )


def test_every_step() -> None:
    stages = three()
    assert [stages.at(step).index for step in range(1, 7)] == [0, 0, 0, 1, 2, 2]
    assert [(s.name, s.first_step, s.last_step) for s in stages.stages] == [
        ("warm", 1, 3),
        ("stage 2", 4, 4),
        ("stage 3", 5, 6),
    ]
    assert stages.total_steps == 6
    for step in (-1, 0, 7):
        with pytest.raises(ValueError, match="outside"):
            stages.at(step)


def test_what_a_stage_leaves_out_is_the_default() -> None:
    """Not the previous stage's value: the response limit of stage 2 ends with it."""
    last = three().at(5)
    assert last.max_response_tokens == 8192
    assert (last.samples_per_prompt, last.clip_high) == (32, 0.4)
    assert {key: getattr(three().at(1), key) for key in SETTINGS} == DEFAULTS


def test_changes() -> None:
    stages = three()
    assert stages.at(4).changes_from(stages.at(3)) == {"max_response_tokens": [8192, 16384]}
    assert stages.at(5).changes_from(stages.at(4)) == {
        "max_response_tokens": [16384, 8192],
        "samples_per_prompt": [16, 32],
        "clip_high": [0.28, 0.4],
    }
    assert stages.at(6).changes_from(stages.at(5)) == {}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Stages([], DEFAULTS)
    with pytest.raises(ValueError, match=r"stages\.0\.steps"):
        Stages([{"name": "x"}], DEFAULTS)
    with pytest.raises(ValueError, match=r"stages\.1: unknown keys max_tokens"):
        Stages([{"steps": 1}, {"steps": 1, "max_tokens": 5}], DEFAULTS)
    with pytest.raises(ValueError, match="exactly"):
        Stages([{"steps": 1}], {"temperature": 1.0})


def test_penalty_cycle() -> None:
    """100 on, 500 off: the boundaries of two cycles."""
    on = [step for step in range(1, 1301) if penalty_on(step, 100, 500)]
    assert on == [*range(1, 101), *range(601, 701), *range(1201, 1301)]
    on = [step for step in range(1, 1201) if penalty_on(step, 100, 500, "off")]
    assert on == [*range(501, 601), *range(1101, 1201)]


def test_penalty_phases_may_be_equal() -> None:
    assert [penalty_on(step, 2, 2) for step in range(1, 7)] == [True, True, False, False] + [
        True
    ] * 2


def test_penalty_without_a_phase() -> None:
    for start in ("on", "off"):
        assert all(penalty_on(step, 3, 0, start) for step in range(1, 20))
        assert not any(penalty_on(step, 0, 3, start) for step in range(1, 20))
    for step, on, off in ((0, 1, 1), (1, 0, 0), (1, -1, 5)):
        with pytest.raises(ValueError, match="penalty cycle"):
            penalty_on(step, on, off)
