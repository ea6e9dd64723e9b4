"""The simulated step: cases by hand, agreement with the formula, what a growing fleet must show."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from prorl_nemo.errors import UserError
from prorl_nemo.planning.engine import (
    Generation,
    decode_seconds,
    engine_memory,
    generation_seconds,
)
from prorl_nemo.planning.hardware import FITTED, find_gpu
from prorl_nemo.planning.plan import Assumptions
from prorl_nemo.planning.shapes import model_shape
from prorl_nemo.planning.simulate import (
    PARTS,
    Step,
    simulate,
    simulate_generation,
    stops_scaling,
    table,
)
from prorl_nemo.recipe import load_recipe

V2 = Path(__file__).parents[2] / "recipes" / "nemotron_1.5b" / "v2.yaml"


def generation(prompts: float, samples: int, mean: float, limit: int, spread: float) -> Generation:
    return Generation(prompts, samples, 100.0, mean, limit, spread)


def test_by_hand() -> None:
    """Lengths without spread: ten responses of 100 tokens, two engines, two places each.

    Three rounds of four places, the last of them half empty, at 0.02 s a token for two.
    """
    work = generation(5, 2, 100.0, 1000, 1.0)
    last, first = simulate_generation(work, 2, 2, [0.01, 0.02])
    assert last == pytest.approx(6.0)
    assert first in (pytest.approx(4.0), pytest.approx(6.0))
    # More places than responses: one round, at the speed of the five sequences of an engine.
    last, _ = simulate_generation(work, 2, 100, [0.01 * n for n in range(1, 101)])
    assert last == pytest.approx(100 * 0.05)


def test_first_responses_are_dealt_out_evenly() -> None:
    """Nine responses for four engines of three places: none is left without any."""
    last, first = simulate_generation(generation(9, 1, 100.0, 1000, 1.0), 4, 3, [0.01, 0.02, 0.03])
    assert first == last == pytest.approx(3.0)


def test_limit_cuts_the_longest() -> None:
    work = generation(2000, 1, 100.0, 150, 1.35)
    last, _ = simulate_generation(work, 2000, 1, [1.0])
    assert last == 150.0


def test_against_the_formula_of_the_planner() -> None:
    """Both count the same roofline; the formula's tail runs to the limit at a quarter of a batch,
    the simulation's where its longest response leads at a full one: within a third."""
    recipe = load_recipe(V2)
    spec, gpu = model_shape(recipe.model), find_gpu("h100")
    engine = engine_memory(recipe, spec, gpu)
    work = generation(624, 16, 2509.0, 7168, 1.35)
    places = engine.sequences(work.prompt + work.mean)
    context = work.prompt + work.mean * work.spread / 2
    speeds = [decode_seconds(spec, engine, gpu, FITTED, n, context) for n in range(1, places + 1)]
    for engines in (8, 16, 32, 64):
        simulated, _ = simulate_generation(work, engines, places, speeds)
        formula = generation_seconds(spec, engine, gpu, FITTED, work, engines)
        assert 0.67 < simulated / formula < 1.5, engines


def test_growing_fleets() -> None:
    steps = simulate(load_recipe(V2), "h100", (8, 32, 128, 512, 4096))
    assert [step.gpus for step in steps] == [8, 32, 128, 512, 4096]
    # A larger fleet is never slower but for the weights' longer way, and never more efficient.
    for before, step in itertools.pairwise(steps):
        assert step.generation <= before.generation and step.updates <= before.updates
        assert step.weights >= before.weights
        assert step.total * step.gpus > before.total * before.gpus
        assert step.ranks <= step.gpus
    # A fixed batch ends with its longest response, however many engines there are.
    assert stops_scaling(steps)[0][1] == "generation"
    assert len(table(steps).splitlines()) == 2 + len(steps)


def test_what_no_engine_can_hold_is_told_and_not_simulated() -> None:
    with pytest.raises(UserError, match=r"rollout.kv_cache_mib: one sequence"):
        simulate(load_recipe(V2, ["rollout.kv_cache_mib=10"]), "h100", (8,))
    with pytest.raises(UserError, match="--keep-rate"):
        simulate(load_recipe(V2), "h100", (8,), Assumptions(keep_rate=0.0))


def test_validation_has_the_engines_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recorded(work: Generation, engines: int, *others: Any) -> tuple[float, float]:
        asked.append(engines)
        return simulate_generation(work, engines, *others)

    monkeypatch.setattr("prorl_nemo.planning.simulate.simulate_generation", recorded)
    simulate(load_recipe(V2, ["rollout.tensor_parallel=2"]), "h100", (8,))
    assert asked == [4, 4]


def test_what_has_stopped_scaling() -> None:
    def step(gpus: int, **parts: float) -> Step:
        seconds = dict.fromkeys(PARTS, 0.0) | parts
        return Step(gpus=gpus, ranks=gpus, layout="", waiting=0.0, **seconds)

    steps = [
        step(8, generation=100, updates=40, weights=1),
        step(16, generation=50, updates=35, weights=1),
        step(32, generation=45, updates=20, weights=1),
    ]
    # Weights never shrink, but are too small to matter.
    assert stops_scaling(steps) == [(16, "updates"), (32, "generation")]


def test_the_page_has_the_tables() -> None:
    page = (V2.parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    assert table(simulate(load_recipe(V2), "h100")) in page
    # The larger batch takes a minute for all its fleets.
    recipe = load_recipe(V2, ["rollout.prompts_per_step=4096"])
    assert table(simulate(recipe, "h100", (8, 64))).splitlines()[-1] in page
