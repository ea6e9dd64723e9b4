"""Early warnings of collapse, and the repetition they rest on: by hand and against a slow count."""

from __future__ import annotations

import json
import math
import random

import pytest

from prorl_nemo.schedule.collapse import LIMITS, CollapseWatch
from prorl_nemo.training.repetition import is_repetitive, repeated_share


def row(**figures: float | None) -> dict[str, float | None]:
    usual: dict[str, float | None] = {
        "policy/entropy": 0.6,
        "rollout/response_tokens_mean": 1000.0,
        "rollout/repetition_share": 0.02,
        "rollout/truncated_share": 0.1,
    }
    return usual | {key.replace("__", "/"): value for key, value in figures.items()}


def quiet(watch: CollapseWatch, steps: range) -> None:
    for step in steps:
        assert watch.observe(step, row()) == []


@pytest.mark.parametrize(
    ("figure", "value", "limit"),
    [
        ("policy/entropy", 1.3, 1.2),  # Twice the usual 0.6.
        ("policy/entropy", 0.19, 0.198),  # A third of it.
        ("rollout/response_tokens_mean", 1801.0, 1800.0),
        ("rollout/response_tokens_mean", 399.0, 400.0),
        ("rollout/repetition_share", 0.06, 0.05),  # Twice 0.02 is below the floor.
        ("rollout/truncated_share", 0.21, 0.2),
    ],
)
def test_each_figure_warns_just_beyond_its_limit(figure: str, value: float, limit: float) -> None:
    watch = CollapseWatch(window=5, pause=3)
    quiet(watch, range(1, 6))
    assert watch.observe(6, row() | {figure: value}) == []  # Once may be chance.
    (warning,) = watch.observe(7, row() | {figure: value})
    assert (warning.figure, warning.value) == (figure, value)
    assert warning.usual == row()[figure]
    assert warning.limit == pytest.approx(limit, rel=1e-12)
    # Just inside, by the same distance: silence.
    inside = 2 * limit - value
    fresh = CollapseWatch(window=5, pause=3)
    quiet(fresh, range(1, 6))
    assert fresh.observe(6, row() | {figure: inside}) == []
    assert fresh.observe(7, row() | {figure: inside}) == []


def test_a_figure_that_has_warned_is_silent_for_a_while() -> None:
    watch = CollapseWatch(window=20, pause=3)
    quiet(watch, range(1, 21))
    heard = [step for step in range(21, 51) if watch.observe(step, row(policy__entropy=0.01))]
    # From step 32 on more than half of the last twenty are 0.01 themselves: it is usual now.
    assert heard == [22, 26, 30]


def test_nothing_is_judged_before_the_window_is_full_nor_after_a_new_stage() -> None:
    watch = CollapseWatch(window=5)
    quiet(watch, range(1, 5))
    assert watch.observe(5, row(policy__entropy=9.0)) == []
    watch.new_stage()
    assert watch.observe(6, row(rollout__response_tokens_mean=9000.0)) == []


def test_absent_and_non_finite_figures_are_passed_over() -> None:
    watch = CollapseWatch(window=2)
    quiet(watch, range(1, 3))
    for step, value in enumerate([None, math.nan, math.inf], start=3):
        assert watch.observe(step, row(policy__entropy=value)) == []
    assert watch.observe(9, {}) == []


def test_a_resumed_watch_warns_as_an_unbroken_one() -> None:
    rng = random.Random(3)
    rows = [{figure: rng.lognormvariate(0, 1) for figure in LIMITS} for _ in range(400)]
    whole, broken = CollapseWatch(window=7, pause=5), CollapseWatch(window=7, pause=5)
    heard = 0
    for step, figures in enumerate(rows, start=1):
        saved = json.loads(json.dumps(broken.state_dict()))
        broken = CollapseWatch(window=7, pause=5)
        broken.load_state_dict(saved)
        warnings = whole.observe(step, figures)
        assert broken.observe(step, figures) == warnings
        heard += len(warnings)
    assert heard > 20


def slow_repeated_share(tokens: list[int], n: int) -> float:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    repeated = sum(gram in grams[:i] for i, gram in enumerate(grams))
    return repeated / len(grams) if grams else 0.0


@pytest.mark.parametrize("n", [1, 3, 20])
def test_repeated_share_against_a_slow_count(n: int) -> None:
    rng = random.Random(n)
    for length in (0, 1, n - 1, n, n + 1, 60, 150):
        for alphabet in (2, 40, 151_000):
            tokens = [rng.randrange(alphabet) for _ in range(length)]
            looped = (tokens[:10] * 20)[:length]
            for case in (tokens, looped):
                expected = slow_repeated_share(case, n)
                assert repeated_share(case, n) == pytest.approx(expected, abs=1e-12)


def test_a_loop_is_repetitive_and_reasoning_is_not() -> None:
    rng = random.Random(0)
    words = [rng.randrange(50_000) for _ in range(400)]
    assert not is_repetitive(words)
    assert not is_repetitive(words + words[:300])  # Quoting much of itself once.
    assert is_repetitive(words[:100] + words[90:100] * 30)
    assert not is_repetitive([])
