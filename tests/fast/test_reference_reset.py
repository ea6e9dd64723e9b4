"""Reference resets: each trigger on synthetic series, cool-down, and resume at any step."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from prorl_nemo.schedule.reference_reset import Decision, ReferenceReset, ResetSettings

NO_TRIGGER = ResetSettings(interval=None, kl_factor=None, stalled_evaluations=None)
KL_ONLY = replace(NO_TRIGGER, kl_factor=3.0, kl_window=20, kl_patience=3, cooldown=5)
STALL_ONLY = replace(NO_TRIGGER, stalled_evaluations=3, cooldown=5)


def run(
    settings: ResetSettings,
    steps: int,
    kl: Callable[[int], float | None] = lambda since: None,
    validation: Callable[[int], float | None] = lambda step: None,
) -> list[Decision]:
    """Resets of a run; `kl` is a function of the steps since the last reset."""
    machine, last, resets = ReferenceReset(settings), 0, []
    for step in range(1, steps + 1):
        decision = machine.observe(step, kl(step - last), validation(step))
        assert decision.step == step
        assert (decision.trigger is not None) == decision.reset
        if decision.reset:
            last = step
            resets.append(decision)
    return resets


def test_everything_off() -> None:
    assert run(NO_TRIGGER, 500, lambda since: since**4, lambda step: 1 / step) == []


def test_defaults_leave_a_healthy_run_to_the_interval() -> None:
    """KL that grows steadily with 20 % noise, validation that improves in fits and starts."""
    rng = random.Random(2)
    resets = run(
        ResetSettings(),
        1000,
        lambda since: 1e-4 * since * rng.uniform(0.8, 1.2),
        lambda step: 0.2 + step // 40 * 0.01 if step % 10 == 0 else None,
    )
    assert [r.step for r in resets] == [300, 600, 900]


def test_first_figures() -> None:
    assert ReferenceReset(ResetSettings()).observe(1).figures == {
        "step": 1,
        "steps_since_reset": 1,
        "resets": 0,
        "kl": None,
        "kl_median": None,
        "kl_threshold": None,
        "kl_spikes": 0,
        "validation": None,
        "best_validation": None,
        "best_step": None,
        "evaluations_since_best": 0,
    }


def test_interval() -> None:
    resets = run(replace(NO_TRIGGER, interval=300), 1000)
    assert [(r.step, r.trigger) for r in resets] == [
        (300, "interval"),
        (600, "interval"),
        (900, "interval"),
    ]
    assert [r.figures["resets"] for r in resets] == [0, 1, 2]
    assert resets[1].figures["steps_since_reset"] == 300


def test_interval_may_be_shorter_than_the_cooldown() -> None:
    assert [r.step for r in run(replace(NO_TRIGGER, interval=2, cooldown=50), 7)] == [2, 4, 6]


def test_interval_counts_from_any_reset() -> None:
    """A spike at step 60 moves the scheduled reset from 100 to 160."""
    machine = ReferenceReset(replace(KL_ONLY, interval=100, kl_patience=1))
    found = []
    for step in range(1, 261):
        decision = machine.observe(step, 0.9 if step == 60 else 0.1)
        if decision.reset:
            found.append((step, decision.trigger))
    assert found == [(60, "kl_spike"), (160, "interval"), (260, "interval")]


def test_kl_spike_needs_patience() -> None:
    def kl(since: int) -> float:
        # Two spikes, a normal step, then three.
        return 0.31 if since in (40, 41, 43, 44, 45) else 0.1

    (reset,) = run(KL_ONLY, 60, kl)
    assert (reset.step, reset.trigger) == (45, "kl_spike")
    assert reset.figures["kl"] == 0.31
    assert reset.figures["kl_median"] == 0.1
    assert reset.figures["kl_threshold"] == pytest.approx(0.3)
    assert reset.figures["kl_spikes"] == 3


def test_kl_threshold_is_strict_and_has_a_floor() -> None:
    # Three times a quarter is exact, three times a tenth is not.
    assert run(KL_ONLY, 100, lambda since: 0.75 if since > 40 else 0.25) == []
    assert run(KL_ONLY, 100, lambda since: 0.7501 if since > 40 else 0.25) != []
    # Ten times the median, and still only a rounding error.
    assert run(KL_ONLY, 100, lambda since: 1e-5 if since % 50 > 40 else 1e-6) == []


def test_steady_growth_is_no_spike_acceleration_is() -> None:
    """After a reset the KL starts from 0; growing linearly it must not trigger again at once."""
    assert run(KL_ONLY, 400, lambda since: 0.01 * since) == []
    resets = run(KL_ONLY, 400, lambda since: 0.001 * since**2)
    # As soon as a full window and the patience allow.
    assert resets[0].step == 23


def test_kl_window_restarts_at_a_reset() -> None:
    """The KL from before a reset would make the small one after it look calm, or the reverse."""
    resets = run(KL_ONLY, 200, lambda since: 0.5 if since > 30 else 0.1)
    assert [r.step for r in resets] == [33, 66, 99, 132, 165, 198]


def test_kl_median_against_slow_reference() -> None:
    rng = random.Random(5)
    machine = ReferenceReset(replace(KL_ONLY, kl_factor=1e9))
    seen: list[float] = []
    for step in range(1, 200):
        kl = rng.expovariate(10)
        figures = machine.observe(step, kl).figures
        expected = statistics.median(seen[-20:]) if len(seen) >= 20 else None
        assert figures["kl_median"] == expected
        seen.append(kl)


def test_steps_without_an_update_are_no_evidence() -> None:
    """NaN in the window would poison the median, and make every comparison false."""
    odd = {45: None, 46: math.nan, 47: math.inf}

    def kl(step: int) -> float | None:
        return odd.get(step, 0.4 if step in (43, 44, 48) else 0.1)

    machine = ReferenceReset(KL_ONLY)
    decisions = [machine.observe(step, kl(step)) for step in range(1, 49)]
    assert [d.step for d in decisions if d.reset] == [48]
    assert decisions[45].figures["kl"] is None
    assert decisions[45].figures["kl_spikes"] == 2


def test_reset_forgets_the_spikes_that_led_to_it() -> None:
    """Also when no KL arrives afterwards that would set the count to 0."""
    machine = ReferenceReset(replace(KL_ONLY, kl_patience=1, cooldown=0))
    kls = [*[0.1] * 20, 0.5, *[None] * 10]
    found = [machine.observe(step, kl).reset for step, kl in enumerate(kls, start=1)]
    assert [step for step, reset in enumerate(found, start=1) if reset] == [21]


def test_stalled_validation() -> None:
    scores = {0: 0.2, 10: 0.3, 20: 0.3, 30: 0.25, 40: 0.29, 50: 0.1}
    machine = ReferenceReset(STALL_ONLY)
    decisions = {step: machine.observe(step, None, scores.get(step)) for step in range(51)}
    assert [step for step, d in decisions.items() if d.reset] == [40]
    reset = decisions[40]
    assert reset.trigger == "stalled_validation"
    assert reset.figures["evaluations_since_best"] == 3
    assert (reset.figures["best_validation"], reset.figures["best_step"]) == (0.3, 10)
    # An equal score is no new best; the first ever is.
    assert [step for step, d in decisions.items() if d.new_best] == [0, 10]
    # The reset starts a new count, but not a new best.
    assert decisions[50].figures["evaluations_since_best"] == 1
    assert decisions[50].figures["best_validation"] == 0.3


def test_cooldown_holds_back_but_does_not_forget() -> None:
    """Validated each step and never better: stalled after 3, held until 5 steps are over."""
    resets = run(STALL_ONLY, 20, validation=lambda step: 0.5)
    # The first evaluation is the best one, so the first stall comes at step 4.
    assert [r.step for r in resets] == [4, 10, 16]
    assert resets[1].figures["evaluations_since_best"] == 6


def test_one_reset_when_all_triggers_apply() -> None:
    settings = replace(
        KL_ONLY, interval=30, kl_window=5, kl_patience=1, stalled_evaluations=1, cooldown=0
    )
    machine = ReferenceReset(replace(settings, kl_factor=1e6))
    for step in range(1, 30):
        decision = machine.observe(step, 0.1, 0.5 if step == 1 else None)
        assert not decision.reset
    machine.settings = settings
    decision = machine.observe(30, 9.0, 0.4)
    assert decision.trigger == "interval"
    assert decision.figures["kl_spikes"] == 1
    assert decision.figures["evaluations_since_best"] == 1
    assert not machine.observe(31, 9.0).reset


@pytest.mark.parametrize(
    ("latest", "source"), [(0.6, "current"), (0.595, "current"), (0.58, "best")]
)
def test_source_best_only_when_the_policy_has_fallen(latest: float, source: str) -> None:
    settings = replace(NO_TRIGGER, interval=3, source="best", optimizer="clear")
    machine = ReferenceReset(settings)
    machine.observe(1, None, 0.6)
    machine.observe(2, None, latest)
    decision = machine.observe(3)
    assert decision.reset
    assert decision.source == source
    assert decision.optimizer == "clear"
    assert decision.figures["best_step"] == 1


def test_source_without_validation_is_the_policy() -> None:
    assert run(replace(NO_TRIGGER, interval=3, source="best"), 3)[0].source == "current"
    fallen = run(replace(NO_TRIGGER, interval=3), 3, validation=lambda step: 1 / step)
    assert fallen[0].source == "current"


@dataclass(frozen=True)
class TruncationJump:
    """A trigger of one's own, as P1's third run would have wanted."""

    name: str = "truncation"

    def fires(self, figures: Mapping[str, float | None], metrics: Mapping[str, float]) -> bool:
        since = figures["steps_since_reset"]
        assert since is not None
        return metrics.get("rollout/truncated_share", 0.0) > 0.3


def test_own_trigger() -> None:
    machine = ReferenceReset(replace(NO_TRIGGER, cooldown=5), [TruncationJump()])
    found = []
    for step in range(1, 20):
        share = 0.5 if step in (4, 6, 12) else 0.1
        decision = machine.observe(step, metrics={"rollout/truncated_share": share})
        if decision.reset:
            found.append((step, decision.trigger))
    # Step 6 lies in the cool-down.
    assert found == [(4, "truncation"), (12, "truncation")]
    assert not machine.observe(20).reset


def test_no_reset_before_the_first_step() -> None:
    """The reference of the untrained policy is the policy."""
    jump = {"rollout/truncated_share": 0.5}
    machine = ReferenceReset(ResetSettings(interval=1), [TruncationJump()])
    assert not machine.observe(0, 1.0, 0.5, jump).reset
    assert machine.observe(1, 1.0, 0.5, jump).reset


def series(steps: int) -> list[tuple[int, float | None, float | None]]:
    """A made-up run in which every trigger fires."""
    rng = random.Random(11)
    rows: list[tuple[int, float | None, float | None]] = []
    for step in range(steps):
        kl = 0.01 * (step % 97) * (8.0 if step % 61 > 55 else 1.0) * rng.uniform(0.8, 1.2)
        score = rng.random() if step % 5 == 0 else None
        rows.append((step, kl if step else None, score))
    return rows


def test_resume_at_any_step_changes_nothing() -> None:
    settings = ResetSettings(
        interval=40, kl_window=15, kl_patience=2, stalled_evaluations=6, cooldown=10, source="best"
    )
    rows = series(400)
    whole = ReferenceReset(settings)
    expected = [whole.observe(*row) for row in rows]
    assert {d.trigger for d in expected} == {None, "interval", "kl_spike", "stalled_validation"}
    assert {d.source for d in expected} == {"current", "best"}
    machine, found = ReferenceReset(settings), []
    for row in rows:
        saved = json.dumps(machine.state_dict())
        machine = ReferenceReset(settings)
        machine.load_state_dict(json.loads(saved))
        found.append(machine.observe(*row))
    assert found == expected
    assert machine.state_dict() == whole.state_dict()


def test_saved_state_is_a_copy() -> None:
    machine = ReferenceReset(KL_ONLY)
    machine.observe(1, 0.1)
    saved = machine.state_dict()
    machine.observe(2, 0.2)
    assert saved["kl_history"] == [0.1]
    machine.load_state_dict(saved)
    machine.observe(2, 0.3)
    assert saved["kl_history"] == [0.1]


def test_smaller_window_on_resume() -> None:
    machine = ReferenceReset(KL_ONLY)
    for step in range(1, 21):
        machine.observe(step, float(step))
    resumed = ReferenceReset(replace(KL_ONLY, kl_window=4))
    resumed.load_state_dict(machine.state_dict())
    assert resumed.observe(21, 1.0).figures["kl_median"] == 18.5


def test_decision_is_json_able() -> None:
    (reset,) = run(replace(NO_TRIGGER, interval=3), 3)
    assert json.loads(json.dumps(reset.figures)) == reset.figures


def test_refusals() -> None:
    machine = ReferenceReset(ResetSettings())
    machine.observe(3)
    for step in (3, 2):
        with pytest.raises(ValueError, match="after step 3"):
            machine.observe(step)
    with pytest.raises(ValueError, match="validation"):
        machine.observe(4, None, math.nan)
    with pytest.raises(ValueError, match="kl_spikes"):
        machine.load_state_dict({k: v for k, v in machine.state_dict().items() if k != "kl_spikes"})
    bad: list[dict[str, Any]] = [
        {"interval": 0},
        {"kl_factor": 1.0},
        {"kl_factor": math.nan},
        {"kl_floor": -1.0},
        {"source": "oldest"},
        {"optimizer": "wipe"},
    ]
    for options in bad:
        with pytest.raises(ValueError, match="reference reset"):
            ResetSettings(**options)


def test_a_reset_that_is_due_comes_before_all_triggers_and_the_cooldown() -> None:
    machine = ReferenceReset(replace(NO_TRIGGER, interval=3, cooldown=50))
    machine.observe(0, validation=0.3)
    assert (machine.last_reset, machine.best) == (None, (0, 0.3))
    decision = machine.observe(1, due="stage_start")
    assert (decision.reset, decision.trigger) == (True, "stage_start")
    assert machine.last_reset == 1
    decision = machine.observe(2, validation=0.5, due="stage_start")  # One step after another.
    assert decision.trigger == "stage_start"
    assert machine.best == (2, 0.5)
    # The interval counts from it, and is not a second reset of the same step.
    assert [machine.observe(step).trigger for step in (3, 4, 5)] == [None, None, "interval"]
    assert machine.observe(8, due="stage_start").trigger == "stage_start"


def test_nothing_is_due_before_the_first_step() -> None:
    assert not ReferenceReset(NO_TRIGGER).observe(0, due="stage_start").reset


def test_rules_may_change_between_steps() -> None:
    """A stage has its own: the state goes on, and new rules judge it."""
    machine = ReferenceReset(NO_TRIGGER)
    for step in range(1, 5):
        assert not machine.observe(step).reset
    machine.settings = replace(NO_TRIGGER, interval=4)
    assert machine.observe(5).trigger == "interval"
