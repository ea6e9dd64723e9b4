"""The study's pure parts: plan, compact results, intervals, crossings, pages."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from prorl_nemo.errors import RecipeError, UserError
from prorl_nemo.study.analysis import (
    Estimate,
    around,
    by_task,
    crossing,
    curve,
    difference,
    estimate,
    sure_count,
)
from prorl_nemo.study.compact import FORMAT, compact, read_result, stretches, write_result
from prorl_nemo.study.forest import draw_forest
from prorl_nemo.study.pages import write_pages
from prorl_nemo.study.plan import Study, load_study
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
        assert len(variant.seeds) == 3
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


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([{"name": "no_kl", "question": "?"}], "the first is the recipe itself"),
        ([{"name": "main", "question": "?", "overrides": ["seed=2"]}], "without overrides"),
        ([{"name": "main", "question": "?"}] * 2, "listed twice"),
        ([{"name": "main", "question": "?", "seeds": [1, 1]}], "different numbers"),
        ([{"name": "Main", "question": "?"}], "name"),
    ],
)
def test_studies_that_cannot_be_run(variants: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    raw = {"pretraining": "p", "recipe": "r", "results": "s", "variants": variants}
    file.write_text(json.dumps(raw))
    with pytest.raises(RecipeError, match=message):
        load_study(file)


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


def test_a_run_becomes_a_result_and_comes_back(tmp_path: Path) -> None:
    run = tmp_path / "study-main-seed1"
    with RunLog(run) as log:
        log.metrics({"kind": "validation", "step": 0, "validation/mean": 0.1, "time/validate": 3})
        for step in (1, 2):
            log.metrics({"kind": "train", "step": step, "time/step": 1.5, "reward/raw_mean": 0.2})
        log.event("reference_reset", 2, trigger="interval")
        log.event("checkpoint_saved", 2)
    result = compact(run, {"start": {"p": 1}, "end": {"p": 2}}, 8)
    assert result["steps"] == 2 and result["training_seconds"] == 3.0
    assert result["validation"] == [{"step": 0, "mean": 0.1, "time/validate": 3}]
    assert result["events"] == [{"step": 2, "event": "reference_reset", "trigger": "interval"}]
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
    with RunLog(tmp_path / "empty"), pytest.raises(UserError, match="no steps"):
        compact(tmp_path / "empty", {}, 8)


def test_a_result_of_three_thousand_steps_is_small(tmp_path: Path) -> None:
    """Tens of kilobytes, so that it can be committed."""
    rng, tasks = random.Random(0), [f"some_task_{n}" for n in range(16)]
    from prorl_nemo.study.compact import CURVES

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
    write_result(
        tmp_path / "r.json", compact(tmp_path / "run", {"start": counts, "end": counts}, 256)
    )
    assert (tmp_path / "r.json").stat().st_size < 100_000


# ---- analysis


def result(values: dict[int, float], **more: Any) -> dict[str, Any]:
    validation = [{"step": step, "mean": value, **more} for step, value in values.items()]
    return {"format": FORMAT, "run": "r", "steps": max(values), "validation": validation}


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
    # Four standard errors of a share of 4,000; the normal's quantile at 12 runs gives 0.924.
    low = 0.91 if runs > 10 else 0.95 - 4 * math.sqrt(0.95 * 0.05 / 4000)
    assert low <= held / 4000 <= 0.964


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
    assert points == [(0, pytest.approx(0.2), pytest.approx(0.1))]
    assert curve([result({0: 0.1})], "mean") == [(0, 0.1, 0.0)]


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


def study(folder: Path) -> Study:
    variants = [
        {"name": "main", "question": "All of it"},
        {"name": "no_kl", "question": "Without KL", "overrides": ["algorithm.kl.coefficient=0.0"]},
        {"name": "absent", "question": "Not run"},
    ]
    raw = {"pretraining": "p", "recipe": "r", "results": str(folder), "variants": variants}
    return Study.model_validate({**raw, "compare_at": 200})


def write(folder: Path, name: str, shift: float, last: int) -> None:
    more = {
        "pass": 0.9,
        "never_trained/mean": 0.3,
        "never_trained/pass": 0.6,
        "t": 0.5,
        "pass/t": 1,
    }
    values = {step: 0.2 + shift + step / 1000 for step in range(0, last + 1, 100)}
    probes = {"start": {"g/t/1": 0, "g/t/2": 5}, "end": {"g/t/1": 50, "g/t/2": 0}}
    write_result(folder / name, {**result(values, **more), "probes": probes})


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


def test_pages(tmp_path: Path) -> None:
    write_pages(study(tmp_path))
    assert not list(tmp_path.iterdir())
    for seed, shift in ((1, 0.0), (2, 0.02)):
        write(tmp_path, f"main_seed{seed}.json", shift, 300)
    write(tmp_path, "no_kl_seed1.json", -0.1, 200)
    write_pages(study(tmp_path))
    page = (tmp_path / "README.md").read_text()
    # Start, thirds and end of the main run: 0.2 and 0.22, Student's t of one degree of freedom.
    assert "| trained, mean | 0.210 ± 0.127 | 0.310 ± 0.127 |" in page
    # A category by its tasks; what the library does not know is a category of its own.
    assert "| **t** | 0.500 ± 0.000 |" in page and "| t | 0.500 ± 0.000 |" in page
    assert "| **all** | 2.0 | 1.0 | 1.0 | 1.0 | 0.0 | 0.0 |" in page
    # At step 200 the last two validations: 0.35 less 0.1, and the main run's of the same seed.
    assert "| no_kl | Without KL | 1 | 0.250 | -0.100 | 0.900 | 0.000 | 0.300 | 0.000 |" in page
    assert "absent" not in page
    figures = re.findall(r"\((\w+\.svg)\)", page)
    assert figures == ["main.svg", "differences.svg", "variants.svg"]
    for name in figures:
        assert ET.parse(tmp_path / name).getroot().tag.endswith("svg")
    tables = [line for line in page.splitlines() if line.startswith("|")]
    for first, second in itertools.pairwise(tables):
        if second.startswith("| ---"):
            assert first.count("|") == second.count("|")
