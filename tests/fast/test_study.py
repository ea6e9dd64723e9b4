"""The study's pure parts: plan, compact results, intervals, crossings, pages."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from prorl_nemo.cli import app
from prorl_nemo.errors import RecipeError, UserError
from prorl_nemo.recipe import Recipe, parse_recipe
from prorl_nemo.study import runner
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
from prorl_nemo.study.blocks import Cards, Figure, Heading, Table, Text, render_html
from prorl_nemo.study.compact import (
    CURVES,
    FORMAT,
    compact,
    read_result,
    starts,
    stretches,
    write_result,
)
from prorl_nemo.study.first_model import FirstModel, hold
from prorl_nemo.study.forest import draw_forest
from prorl_nemo.study.pages import PAGE, write_pages
from prorl_nemo.study.panels import Curve, Panel, draw_panels
from prorl_nemo.study.plan import Study, Variant, load_study
from prorl_nemo.study.results import read_results
from prorl_nemo.study.runner import chosen
from prorl_nemo.training.metrics import RunLog

ROOT = Path(__file__).parents[2]


# ---- the plan


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> Study:
    """The study of this repository, whose paths are those of its root."""
    monkeypatch.chdir(ROOT)
    return load_study(Path("recipes/study/study.yaml"))


def test_every_variant_is_a_recipe_that_differs(committed: Study) -> None:
    main = committed.main_recipe
    for variant in committed.variants:
        recipe = committed.recipe_of(variant, 2)
        assert (recipe.seed, recipe.name) == (2, f"study-{variant.name}-seed2")
        assert len(variant.seeds) == 3 and recipe.model == committed.model
        if variant.overrides:
            assert recipe.total_steps >= committed.compare_at
            same = {"name": main.name, "seed": main.seed, "stages": main.stages}
            assert recipe.model_copy(update=same) != main


def test_the_main_recipe_is_what_the_page_says(committed: Study) -> None:
    """3,000 steps, at least 12 tasks of 5 categories, some never trained on."""
    from reasoning_gym.factory import DATASETS

    recipe = committed.main_recipe
    assert recipe.total_steps == 3000
    tasks = [source.task or "" for source in recipe.data.sources]
    categories = {DATASETS[task][0].__module__.split(".")[1] for task in tasks}
    assert len(tasks) >= 12 and len(categories) >= 5
    assert len(tasks) - len(recipe.data.trained) >= 3


def test_the_first_seeds_come_first(committed: Study) -> None:
    order = [(variant.name, seed) for variant, seed in chosen(committed, [])]
    assert [seed for _, seed in order] == sorted(seed for _, seed in order)
    assert order[0] == ("main", 1) and len(order) == 3 * len(committed.variants)
    assert [seed for _, seed in chosen(committed, ["main"])] == [1, 2, 3]
    with pytest.raises(UserError, match="no variant no_cosin; it has main"):
        list(chosen(committed, ["no_cosin"]))


def test_a_seed_can_be_chosen(committed: Study) -> None:
    assert [(v.name, seed) for v, seed in chosen(committed, ["main", "no_kl"], [3, 2])] == [
        ("main", 2),
        ("no_kl", 2),
        ("main", 3),
        ("no_kl", 3),
    ]
    with pytest.raises(UserError, match="--seed: no variant that is to be run has seed 4"):
        list(chosen(committed, ["main"], [1, 4]))


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([{"name": "no_kl", "question": "?"}], "the first is the recipe itself"),
        ([{"name": "main", "question": "?", "overrides": ["seed=2"]}], "without overrides"),
        ([{"name": "main", "question": "?"}] * 2, "listed twice"),
        ([{"name": "main", "question": "?", "seeds": [1, 1]}], "different numbers"),
        ([{"name": "Main", "question": "?"}], "name"),
        ([{"name": "main", "question": "?", "expected": "worse"}], "expected"),
    ],
)
def test_studies_that_cannot_be_run(variants: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    raw = {"pretraining": "p", "model": "m", "recipe": "r", "results": "s", "variants": variants}
    file.write_text(json.dumps(raw))
    with pytest.raises(RecipeError, match=message):
        load_study(file)


def test_a_probe_of_a_variant_that_is_not_there(tmp_path: Path) -> None:
    raw = study(tmp_path).model_dump()
    with pytest.raises(ValueError, match=r"probe\.variants: there is no variant no_kll"):
        Study.model_validate({**raw, "probe": {"variants": ["main", "no_kll"]}})


# ---- results


def test_stretches_by_hand() -> None:
    rows: list[dict[str, Any]] = [
        {"step": step, "reward/raw_mean": step / 100, "policy/kl": None} for step in range(1, 13)
    ]
    rows[11]["policy/kl"] = 0.123456789
    assert stretches(rows) == {
        "step": [10, 12],
        "reward/raw_mean": [0.055, 0.115],
        "policy/kl": [None, 0.12346],
    }


def test_runs_that_another_process_has_made_since_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, ran = study(tmp_path), []
    model = FirstModel(tmp_path / "model", "a" * 64)

    def run(study: Study, variant: Variant, seed: int, *rest: Any) -> bool:
        ran.append((variant.name, seed))
        write(tmp_path, variant.name, seed)
        write(tmp_path, "main", 2)  # By the other one.
        return True

    monkeypatch.setattr(runner, "first_model", lambda study, console: model)
    monkeypatch.setattr(runner, "_run", run)
    assert runner.run_study(plan, ["main"], Console())
    assert ran == [("main", 1), ("main", 3)]


def test_every_curve_is_a_figure_that_runs_write() -> None:
    documented = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [key for key in CURVES if f"`{key}`" not in documented] == []


def test_a_run_becomes_a_result_and_comes_back(tmp_path: Path) -> None:
    run = tmp_path / "study-main-seed1"
    with RunLog(run) as log:
        log.event("run_started", 0, recipe="f00")
        log.metrics(
            {
                "kind": "validation",
                "step": 0,
                "validation/mean": 0.123456789,
                "validation/domain/logic": 0.1,
                "validation/pass/chain_sum": 1.0,
                "time/validate": 3.0,
            }
        )
        for step in (1, 2):
            log.metrics({"kind": "train", "step": step, "time/step": 1.5, "time/checkpoint": 0.25})
        log.event("reference_reset", 2, trigger="interval", figures={"kl": 0.123456789})
        log.event("checkpoint_saved", 2, path="/somewhere")
        log.event("resumed", 2, checkpoint="/somewhere/step_000002")
        log.event("finished", 2)
    recipe = small_recipe(tmp_path)
    result = compact(run, recipe, variant="main", seed=1, model_sha256="a" * 64, probe=None)
    assert result["steps"] == 2 and result["rows_lost"] == 0
    # Two steps, the wait for their checkpoints, and the validation before the first.
    assert result["training_seconds"] == 6.5
    assert result["validation"] == {
        "step": [0],
        "mean": [0.12346],
        "pass/chain_sum": [1.0],
        "time/validate": [3.0],
    }
    assert result["events"] == [
        {"step": 2, "event": "reference_reset", "trigger": "interval", "figures": {"kl": 0.12346}}
    ]
    assert result["starts"]["killed"] == 1 and result["starts"]["resumed_at"] == [2]
    assert result["tasks"] == {
        "chain_sum": {"category": "arithmetic", "trained": True},
        "aiw": {"category": "logic", "trained": False},
    }
    assert parse_recipe(result["recipe"]).stages == recipe.stages
    # It is committed: no path of the machine is in it.
    assert str(tmp_path) not in json.dumps(result) and "somewhere" not in json.dumps(result)
    file = tmp_path / "results" / "main_seed1.json"
    assert read_result(file) is None
    write_result(file, result)
    assert read_result(file) == result
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    file.write_text('{"format": 0}')
    with pytest.raises(UserError, match="not a result of this version"):
        read_result(file)
    file.write_text('{"form')
    with pytest.raises(UserError, match="restore or delete"):
        read_result(file)


def test_runs_without_figures_or_with_a_step_twice_are_refused(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    with RunLog(tmp_path / "empty"), pytest.raises(UserError, match="no steps"):
        compact(tmp_path / "empty", recipe)
    with RunLog(tmp_path / "twice") as log:
        log.metrics({"kind": "validation", "step": 0, "validation/mean": 0.1})
        for step in (1, 2, 2):
            log.metrics({"kind": "train", "step": step})
    with pytest.raises(UserError, match="twice or in no order"):
        compact(tmp_path / "twice", recipe)


def test_a_lost_row_is_counted(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run") as log:
        log.metrics({"kind": "validation", "step": 0, "validation/mean": 0.1})
        for step in (1, 3):
            log.metrics({"kind": "train", "step": step})
        log.event("finished", 4)
    found = compact(tmp_path / "run", small_recipe(tmp_path))
    # Of the last step too: it is made, and the run reaches the step of comparison.
    assert found["rows_lost"] == 2 and found["steps"] == 4


def test_starts_by_hand() -> None:
    """Killed before the first checkpoint, stopped, a rank lost, killed, finished; and the finished
    run looked at again."""
    names = (
        ("run_started", 0),
        ("run_started", 0),
        ("stopped", 40),
        ("resumed", 40),
        ("engine_restarted", 45),
        ("restarted", 60),
        ("resumed", 50),
        ("resumed", 70),
        ("finished", 90),
        ("resumed", 90),
        ("finished", 90),
    )
    found = starts({"event": event, "step": step} for event, step in names)
    assert found == {
        "begun": 6,
        "stopped": 1,
        "faults": 1,
        "killed": 2,
        "engines_replaced": 1,
        "resumed_at": [40, 50, 70, 90],
    }


def test_a_result_of_three_thousand_steps_is_small(tmp_path: Path, committed: Study) -> None:
    """Tens of kilobytes, so that it can be committed."""
    rng = random.Random(0)
    recipe = committed.main_recipe
    tasks = [source.task for source in recipe.data.sources]
    with RunLog(tmp_path / "run") as log:
        for step in range(3001):
            if step % 100 == 0:
                row = {f"validation/{a}{t}": rng.random() for t in tasks for a in ("", "pass/")}
                log.metrics({"kind": "validation", "step": step, **row})
            if step:
                row = {key: rng.random() for key in CURVES}
                log.metrics({"kind": "train", "step": step, **row})
    counts = {
        f"reasoning_gym/{t}/held_out-{n}": rng.randrange(257) for t in tasks for n in range(16)
    }
    asked = {"start": counts, "end": counts}
    write_result(tmp_path / "r.json", compact(tmp_path / "run", recipe, probe=asked))
    assert (tmp_path / "r.json").stat().st_size < 100_000


# ---- what belongs together


def small_recipe(folder: Path, **changes: Any) -> Recipe:
    raw = {
        "name": "study-main-seed1",
        "model": str(folder / "model"),
        "runs_dir": str(folder / "runs"),
        "data": {"sources": [{"task": "chain_sum"}, {"task": "aiw", "train": False}]},
        "stages": [{"steps": 300}],
    }
    return parse_recipe({**raw, **changes})


def study(folder: Path) -> Study:
    """A study whose recipe lies in the folder, and its results in `results/`."""
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        recipe.write_text(json.dumps(small_recipe(folder).model_dump(mode="json")))
    short = "stages=[{steps: 200}]"
    variants = [
        {"name": "main", "question": "All of it"},
        {
            "name": "no_kl",
            "question": "Without KL",
            "overrides": ["algorithm.kl.coefficient=0.0", short],
            "expected": "lower",
        },
        {"name": "absent", "question": "Not run"},
    ]
    raw = {
        "pretraining": "p",
        "model": str(folder / "model"),
        "recipe": str(recipe),
        "results": str(folder / "results"),
        "variants": variants,
    }
    return Study.model_validate({**raw, "compare_at": 200, "probe": {"samples": 256}})


def write(folder: Path, name: str, seed: int, shift: float = 0.0, **changes: Any) -> Path:
    """A result of the study in the folder."""
    plan = study(folder)
    variant = next(v for v in plan.variants if v.name == name)
    recipe = plan.recipe_of(variant, seed)
    steps = list(range(0, recipe.total_steps + 1, 100))
    prompts = ("reasoning_gym/chain_sum/1", "reasoning_gym/chain_sum/2")
    start, end = dict(zip(prompts, (0, 5))), dict(zip(prompts, (50, 0)))
    asked = {
        "prompts_per_task": 16,
        "samples": 256,
        "response_limit": 64,
        "start": start,
        "end": end,
    }
    flat = {
        "pass": 0.9,
        "never_trained/mean": 0.3,
        "never_trained/pass": 0.6,
        "chain_sum": 0.5,
        "pass/chain_sum": 1.0,
        "aiw": 0.25,
        "pass/aiw": 0.75,
        "response_tokens_mean": 20.0,
    }
    tasks = {
        "chain_sum": {"category": "arithmetic", "trained": True},
        "aiw": {"category": "logic", "trained": False},
    }
    row = {
        "format": FORMAT,
        "run": recipe.name,
        "variant": name,
        "seed": seed,
        "model_sha256": "a" * 64,
        "probe": asked if name == "main" else None,
        "recipe": recipe.model_dump(mode="json", exclude={"runs_dir"}),
        "versions": {"vllm": "1"},
        "processor": "p, 2 cores",
        "steps": recipe.total_steps,
        "rows_lost": 0,
        "training_seconds": 600.0,
        "starts": {"begun": 2, "killed": 1, "resumed_at": [100]},
        "tasks": tasks,
        "validation": {
            "step": steps,
            "mean": [0.2 + shift + step / 1000 for step in steps],
            **{key: [value] * len(steps) for key, value in flat.items()},
        },
        "train": {
            "step": [10, 20],
            "policy/kl": [None, 0.1],
            "time/step": [1.0, 2.0],
            "rollout/generated_tokens": [50000.0, 70000.0],
        },
        "events": [
            {"step": 150, "event": "reference_reset", "trigger": "kl_spike"},
            {"step": 1150, "event": "reference_reset", "trigger": "interval"},
        ],
    }
    file = plan.result_file(name, seed)
    write_result(file, {**row, **changes})
    return file


def test_results_of_one_model_and_one_recipe_belong_together(tmp_path: Path) -> None:
    write(tmp_path, "main", 1)
    write(tmp_path, "no_kl", 2)
    found = read_results(study(tmp_path), None)
    assert {name: list(runs) for name, runs in found.items()} == {"main": [1], "no_kl": [2]}
    assert read_results(study(tmp_path), "a" * 64) == found


def test_results_of_another_first_model_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "main", 1)
    with pytest.raises(
        UserError, match=r"main_seed1\.json: its run began with another first model"
    ):
        read_results(study(tmp_path), "b" * 64)
    # Among themselves, where the model is not there.
    write(tmp_path, "no_kl", 1, model_sha256="b" * 64)
    with pytest.raises(UserError, match=r"no_kl_seed1\.json: .*sha256 bbbbbbbbbbbb"):
        read_results(study(tmp_path), None)


def test_results_of_another_recipe_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "main", 1)
    raw = json.loads((tmp_path / "recipe.yaml").read_text())
    raw["policy"]["threads"] = 1  # How fast, not what.
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    read_results(study(tmp_path), None)
    raw["reference_reset"]["interval"] = 200
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"reference_reset\.interval: 300 there, 200 now"):
        read_results(study(tmp_path), None)


def test_a_key_that_a_later_version_adds_is_no_other_recipe(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path).model_dump(mode="json")
    del recipe["tracking"]
    write(tmp_path, "main", 1, recipe={**recipe, "name": "study-main-seed1"})
    read_results(study(tmp_path), None)
    recipe["unheard_of"] = 1
    write(tmp_path, "main", 1, recipe=recipe)
    with pytest.raises(UserError, match="of another version"):
        read_results(study(tmp_path), None)


def test_a_result_with_a_part_missing_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "main", 1)
    found = json.loads(file.read_text())
    del found["train"], found["probe"]
    write_result(file, found)
    with pytest.raises(UserError, match=r"main_seed1\.json: lacks probe, train; restore it"):
        read_results(study(tmp_path), None)


def test_results_of_another_probe_are_refused(tmp_path: Path) -> None:
    asked = {"prompts_per_task": 16, "samples": 64, "start": {}, "end": {}}
    write(tmp_path, "main", 1, probe=asked)
    with pytest.raises(UserError, match=r"probe\.samples: 64 there, 256 now"):
        read_results(study(tmp_path), None)


def test_a_run_goes_on_with_the_model_it_began_with(tmp_path: Path) -> None:
    run, model = tmp_path / "run", FirstModel(tmp_path / "model", "a" * 64)
    hold(run, model)
    hold(run, model)
    with pytest.raises(UserError, match="began with another first model"):
        hold(run, FirstModel(tmp_path / "model", "b" * 64))
    with RunLog(tmp_path / "foreign") as log:
        log.metrics({"kind": "train", "step": 1})
    with pytest.raises(UserError, match="not begun by a study"):
        hold(tmp_path / "foreign", model)


# ---- analysis


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
    assert math.comb(samples, count) / math.comb(2 * samples, count) < 0.01 or count == samples
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


# ---- pages


def test_forest_by_hand() -> None:
    rows = [
        ("a", Estimate(0.2, 0.1, 3)),
        ("<b>", Estimate(-0.1, 0.2, 3)),
        ("c", Estimate(0.0, None, 1)),
    ]
    root = ET.fromstring(draw_forest(rows, "t"))
    dots = [float(dot.attrib["cx"]) for dot in root.iter("{http://www.w3.org/2000/svg}circle")]
    # The reach is 0.3 each side, and zero in the middle of 190 ... 700.
    assert dots[2] == pytest.approx(445.0)
    assert dots[0] - 445 == pytest.approx(2 * (445 - dots[1]), abs=0.2)
    classes = [g.attrib["class"] for g in root.iter("{http://www.w3.org/2000/svg}g")]
    assert classes == ["c2", "c0", "c0"]
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "+0.200 ± 0.100" in texts and "<b>" in texts and "+0.000, one run" in texts
    assert any("Green: above zero" in (text or "") for text in texts)


def test_panels_by_hand() -> None:
    panels = [
        Panel("<a>", [Curve([(0, 0.0), (100, 1.0)]), Curve([(0, 0.5)], 1, thin=True)], marks=[50]),
        Panel("empty", []),
        Panel("flat", [Curve([(0, 2.0), (50, 2.0)])]),
    ]
    root = ET.fromstring(draw_panels(panels, "t", columns=2))
    paths = [path.attrib for path in root.iter("{http://www.w3.org/2000/svg}path")]
    assert [path["class"] for path in paths] == ["curve", "curve thin", "curve"]
    first, last = (
        tuple(map(float, point.split())) for point in paths[0]["d"].removeprefix("M").split("L")
    )
    # The range of steps fills the width, and the highest value is just below the top.
    assert (first[0], last[0]) == (44.0, 399.0) and first[1] > last[1] > 44 + 30
    # All panels have the same steps: half of them is half of the width.
    flat = [float(point.split()[0]) for point in paths[2]["d"].removeprefix("M").split("L")]
    assert flat[1] - flat[0] == pytest.approx((last[0] - first[0]) / 2, abs=0.11)
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "<a>" in texts and "empty" not in texts and texts[-1] == "training step"
    marks = [line for line in root.iter() if line.attrib.get("class") == "at"]
    assert [float(mark.attrib["x1"]) for mark in marks] == [221.5]


def test_pages(tmp_path: Path) -> None:
    assert not write_pages(study(tmp_path)) and not (tmp_path / "results").exists()
    for seed, shift in ((1, 0.0), (2, 0.02)):
        write(tmp_path, "main", seed, shift)
        write(tmp_path, "no_kl", seed, -0.1 + shift / 2)
    (tmp_path / "results" / "old.svg").write_text("of an earlier page")
    assert write_pages(study(tmp_path))
    page = (tmp_path / "results" / "README.md").read_text()
    # Start, thirds and end of the main run: 0.2 and 0.22, Student's t of one degree of freedom.
    assert "| trained, mean | 0.210 ± 0.127 | 0.310 ± 0.127 | 0.360 ± 0.127 |" in page
    # And the paired gains, of the run and of its last third.
    assert "| 0.410 ± 0.127 | 0.200 ± 0.000 | 0.050 ± 0.000 |" in page
    # All of the seeds gain the same: 0.3 over the run. Half of that in the means of windows.
    assert "| validation rises over the run | 0.200 ± 0.000 | as the paper |" in page
    assert "| tasks never trained on gain as well | 0.000 ± 0.000 | not decided |" in page
    assert "| **arithmetic** | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.000 ± 0.000 |" in page
    assert "| aiw (unseen) | 0.250 ± 0.000 |" in page
    assert "| **all** | 2.0 | 1.0 | 1.0 | 1.0 | 0.0 | 0.0 |" in page
    # Of 256 samples 0 and 5 were right before; the first model is one, so without an interval.
    assert "| trained, start | 0.010 |" in page and "| trained, end | 0.098 ± 0.000 |" in page
    assert "mean over seeds; 64 tokens of response before and after." in page
    # At step 200 the last two validations: 0.35 less 0.1, and 0.37 less 0.11.
    assert "| no_kl | Without KL | 2 | 0.255 ± 0.064 | -0.105 ± 0.064 |" in page
    assert "| no_kl | lower | as the paper |" in page
    assert "| seeds | mean | less main | pass@4 | less main | unseen, mean |" in page
    # Ten steps with 50,000 tokens each, and ten with 70,000.
    assert "| seed 1 | 300 | 10 min | 2 | 1 | 100 | 1.2 M | 0 | p, 2 cores |" in page
    assert "| seed 2 | 2 | 150 (kl spike), 1,150 (interval) |" in page
    assert "paired by seed: both ends are measured with 8192 tokens" in page
    assert "absent" not in page
    figures = re.findall(r"\((\w+\.svg)\)", page)
    assert sorted(figures) == sorted(file.name for file in (tmp_path / "results").glob("*.svg"))
    assert len(figures) == 6
    for name in figures:
        assert ET.parse(tmp_path / "results" / name).getroot().tag.endswith("svg")
    tables = [line for line in page.splitlines() if line.startswith("|")]
    for first, second in itertools.pairwise(tables):
        if second.startswith("| ---"):
            assert first.count("|") == second.count("|")
    html = (tmp_path / "results" / PAGE).read_text()
    assert html.count("<svg") == 6 and html.count("<style>") == 1 and "<script" not in html


def test_a_single_main_run_has_a_page_without_intervals(tmp_path: Path) -> None:
    write(tmp_path, "main", 3, probe=None)
    assert write_pages(study(tmp_path))
    page = (tmp_path / "results" / "README.md").read_text()
    assert "| validation rises over the run | 0.200 | one run: not decided |" in page
    assert "Variants" not in page and "newly solved" not in page
    assert "![Validation, 1 seed](main.svg)" in page
    assert "intervals over seeds" not in page


def test_the_page_names_all_versions_and_the_time_of_all_runs(tmp_path: Path) -> None:
    write(tmp_path, "main", 1, versions={"torch": "2.7", "vllm": "1"})
    write(tmp_path, "main", 2, versions={"torch": "2.8", "vllm": "1"})
    write(tmp_path, "no_kl", 1, versions={"torch": "2.7", "vllm": "1"})
    write_pages(study(tmp_path))
    about = "3 runs, 0.5 hours, from the model aaaaaaaaaaaa; torch 2.7 and 2.8, vllm 1"
    for name in ("README.md", PAGE):
        assert about in (tmp_path / "results" / name).read_text()


def test_bands_are_the_intervals_of_the_tables(tmp_path: Path) -> None:
    """Two standard errors are no 95 % of two or three seeds."""
    for seed, shift in ((1, 0.0), (2, 0.02)):
        write(tmp_path, "main", seed, shift)
    write_pages(study(tmp_path))
    root = ET.parse(tmp_path / "results" / "main.svg").getroot()
    paths = [path.attrib for path in root.iter("{http://www.w3.org/2000/svg}path")]
    band, line = (
        [float(point.split()[1]) for point in path["d"].strip("MZ").split("L")]
        for path in paths[:2]
    )
    # The band has an upper and a lower edge; the scores rise by 0.3 over the run.
    width, rise = band[-1] - band[0], line[0] - line[-1]
    assert width / rise == pytest.approx(2 * 12.706 * 0.01 / 0.3, rel=0.01)
    page = (tmp_path / "results" / "README.md").read_text()
    assert "![Validation, 2 seeds, 95 % intervals over seeds](main.svg)" in page


def test_a_validation_without_a_task_leaves_out_that_step(tmp_path: Path) -> None:
    file = write(tmp_path, "main", 1)
    found = json.loads(file.read_text())
    found["tasks"]["gcd"] = {"category": "arithmetic", "trained": True}
    found["validation"] |= {"gcd": [0.5, None, 0.5, 0.5], "pass/gcd": [1.0, None, 1.0, 1.0]}
    write_result(file, found)
    write_pages(study(tmp_path))
    root = ET.parse(tmp_path / "results" / "categories.svg").getroot()
    paths = [path.attrib["d"] for path in root.iter("{http://www.w3.org/2000/svg}path")]
    assert [path.count("L") for path in paths] == [2, 2, 3, 3]


def test_tasks_of_no_category_have_a_page_too(tmp_path: Path) -> None:
    write(tmp_path, "main", 1, tasks={})
    write_pages(study(tmp_path))
    page = (tmp_path / "results" / "README.md").read_text()
    assert "By category" not in page and "| trained, mean | 0.200 |" in page


def test_gains_measured_with_two_limits_are_said_to_be(tmp_path: Path) -> None:
    stages = [{"steps": 200, "max_response_tokens": 48}, {"steps": 100, "max_response_tokens": 72}]
    raw = small_recipe(tmp_path, stages=stages).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    write(tmp_path, "main", 1)
    write_pages(study(tmp_path))
    page = (tmp_path / "results" / "README.md").read_text()
    differs = "the response limit differs, 48 tokens at its start, 72 at its end."
    assert f"paired by seed: {differs}" in page and f"Gain over the run: {differs}" in page
    assert "of its stage: 48 tokens up to step 200, 72 tokens up to step 300." in page


def test_html_shows_text_as_text() -> None:
    blocks = [
        Heading("<b>"),
        Text("*so* & so"),
        Table(["", "verdict"], [["<i>", CONTRADICTS]]),
        Cards([("<", "1", ">")]),
        Figure("f", draw_forest([("<script>", Estimate(0.1, None, 1))], "t"), "t"),
    ]
    page = render_html("k", "<t>", "a", blocks)
    for piece in ("<h2>&lt;b&gt;</h2>", "<i>so</i> &amp; so", "&lt;i&gt;", "&lt;script&gt;"):
        assert piece in page
    assert f'<td class="bad">{CONTRADICTS}</td>' in page and "<script" not in page


def test_the_command_writes_pages_or_says_why_not(tmp_path: Path) -> None:
    plan = study(tmp_path)
    (tmp_path / "study.yaml").write_text(json.dumps(plan.model_dump(mode="json")))
    arguments = ["study", str(tmp_path / "study.yaml"), "--pages"]
    nothing = CliRunner().invoke(app, arguments)
    assert nothing.exit_code == 2 and "holds no result of this study yet" in nothing.output
    write(tmp_path, "main", 1)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (tmp_path / "results" / PAGE).is_file()
    write(tmp_path, "no_kl", 1, model_sha256="b" * 64)
    mixed = CliRunner().invoke(app, arguments)
    assert mixed.exit_code == 2 and "another first model" in mixed.output
