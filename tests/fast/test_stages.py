"""Stages and penalty cycles: every boundary step."""

from __future__ import annotations

import json
import random
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
    "truncated_factor": 0.0,
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


def stalling(scores: list[float], patience: int, steps: int = 20, interval: int = 2) -> Stages:
    """A stage that may end early, and two after it; validated every `interval` steps."""
    stages = Stages(
        [{"steps": steps, "ends_when_stalled": patience}, {"steps": 4}, {"steps": 2}], DEFAULTS
    )
    for number, score in enumerate(scores, start=1):
        if stages.observe(number * interval, score):
            break
    return stages


def slow_end(scores: list[float], patience: int, steps: int, interval: int) -> int:
    """The last step of the first stage by its definition: look back at all validations so far."""
    for number in range(1, len(scores) + 1):
        best = max(range(number), key=lambda i: (scores[i], -i))
        if number * interval < steps and number - 1 - best >= patience:
            return number * interval
    return steps


def test_a_stage_ends_when_its_validation_stalls() -> None:
    stages = stalling([0.1, 0.3, 0.3, 0.2, 0.25, 0.9], patience=3)
    # Best after step 4; 6, 8 and 10 are no better (an equal score is no new best).
    assert [(s.first_step, s.last_step) for s in stages.stages] == [(1, 10), (11, 14), (15, 16)]
    assert stages.total_steps == 16
    assert stages.at(11).index == 1


def test_stage_ends_against_a_slow_reference() -> None:
    rng = random.Random(5)
    for _ in range(300):
        scores = [rng.randrange(6) / 5 for _ in range(9)]
        patience, interval = rng.randint(1, 4), rng.randint(1, 2)
        stages = stalling(scores, patience, steps=9 * interval, interval=interval)
        assert stages.stages[0].last_step == slow_end(scores, patience, 9 * interval, interval)


def test_the_next_stage_begins_with_no_best() -> None:
    stages = Stages([{"steps": 3}, {"steps": 9, "ends_when_stalled": 1}], DEFAULTS)
    assert not stages.observe(3, 0.9)  # The last step of a stage: it ends as planned.
    assert not stages.observe(4, 0.1)
    assert not stages.observe(5, 0.2)
    assert stages.observe(6, 0.2)


def test_the_next_stage_begins_with_no_best_where_the_last_step_is_not_validated() -> None:
    """Validated every third step, stages of five: a score of the first is no mark for the second,
    whose response limit may be another. As nemotron_1.5b/v1: a stage ends at 850, not at 840."""
    stages = Stages([{"steps": 5}, {"steps": 30, "ends_when_stalled": 2}], DEFAULTS)
    for step, score in ((3, 0.9), (6, 0.1), (9, 0.2), (12, 0.1)):
        assert not stages.observe(step, score)
    saved = json.loads(json.dumps(stages.state_dict()))
    assert stages.observe(15, 0.2) and stages.total_steps == 15
    resumed = Stages([{"steps": 5}, {"steps": 30, "ends_when_stalled": 2}], DEFAULTS)
    resumed.load_state_dict(saved)
    assert resumed.observe(15, 0.2)
    # Written before checkpoints said which stage the best is of.
    del saved["validated"]
    resumed = Stages([{"steps": 5}, {"steps": 30, "ends_when_stalled": 2}], DEFAULTS)
    resumed.load_state_dict(saved)
    assert resumed.observe(15, 0.2)


def test_without_the_condition_nothing_ends() -> None:
    stages = three()
    assert not any(stages.observe(step, -float(step)) for step in range(1, 7))
    assert stages.total_steps == 6


def test_stages_resume_at_any_step() -> None:
    rng = random.Random(1)
    recipe = [{"steps": 8, "ends_when_stalled": 2}] * 4
    for _ in range(50):
        whole, broken = Stages(recipe, DEFAULTS), Stages(recipe, DEFAULTS)
        step = 1
        while step <= whole.total_steps:
            saved = json.loads(json.dumps(broken.state_dict()))
            broken = Stages(recipe, DEFAULTS)
            broken.load_state_dict(saved)
            score = rng.random()
            assert whole.observe(step, score) == broken.observe(step, score)
            assert whole.stages == broken.stages
            step += 1
