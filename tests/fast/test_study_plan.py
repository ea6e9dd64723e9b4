"""Which runs a study has, in what order, and which of them are still to be made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from studies import study, write

from prorl_nemo.errors import RecipeError, UserError
from prorl_nemo.study import probe, runner
from prorl_nemo.study.first_model import FirstModel
from prorl_nemo.study.plan import Study, Variant, load_study
from prorl_nemo.study.results import read_results
from prorl_nemo.study.runner import chosen

ROOT = Path(__file__).parents[2]


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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of the study of `studies`, with a variant whose own layout is two engines."""
    plan = study(tmp_path)
    plan.variants[1].overrides.append("rollout.engines=2")
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps(plan.model_dump(mode="json")))
    return file


def test_where_and_how_fast_is_said_on_the_command_line(file: Path) -> None:
    """For every run, also one that its variant lays out; and for the probes, by the main recipe."""
    plain, given = load_study(file), load_study(file, ["rollout.engines=3", "policy.threads=1"])
    no_kl = given.variants[1]
    for recipe in (given.main_recipe, *(given.recipe_of(v, 1) for v in given.variants)):
        assert (recipe.rollout.engines, recipe.policy.threads) == (3, 1)
    assert plain.recipe_of(no_kl, 1).rollout.engines == 2
    assert given.recipe_of(no_kl, 1).algorithm.kl.coefficient == 0.0


def test_results_made_elsewhere_belong_to_the_study(file: Path) -> None:
    write(file.parent, "main", 1)
    given = load_study(file, ["policy.data_parallel=2", "rollout.engines=3", "runs_dir=elsewhere"])
    assert list(read_results(given, None)["main"]) == [1]
    # Nor is the first model asked again.
    assert runner._asked(given, given.main_recipe) == runner._asked(
        load_study(file), load_study(file).main_recipe
    )


@pytest.mark.parametrize(
    "override", ["seed=4", "policy.precision=fp32", "policy={threads: 1}", "model=m", "main"]
)
def test_what_could_change_results_is_a_variant(file: Path, override: str) -> None:
    key = re.escape(override.partition("=")[0])
    with pytest.raises(UserError, match=f"^{key}: .*give it a variant"):
        load_study(file, ["policy.threads=1", override])


def test_the_probe_has_the_engines_of_its_recipe(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started(Exception):
        pass

    def fleet(settings: Any, count: int, *, actor_options: list[Any], **rest: Any) -> None:
        raise Started(count, len(actor_options), settings.threads, rest["hang_seconds"])

    prompts = SimpleNamespace(validation=[], stream=None)
    monkeypatch.setattr(probe, "load_tokenizer", lambda folder: None)
    monkeypatch.setattr(probe, "load_prompts", lambda recipe, tokenizer: prompts)
    monkeypatch.setattr(probe, "Fleet", fleet)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    overrides = ["rollout.engines=3", "rollout.engine_threads=2", "rollout.engine_hang_seconds=7.0"]
    plan = load_study(file, overrides)
    with pytest.raises(Started) as started:
        probe.probe(plan.main_recipe, file.parent, plan.probe, lambda: False)
    assert started.value.args == (3, 3, 2, 7.0)


def test_a_probe_of_a_variant_that_is_not_there(tmp_path: Path) -> None:
    raw = study(tmp_path).model_dump()
    with pytest.raises(ValueError, match=r"probe\.variants: there is no variant no_kll"):
        Study.model_validate({**raw, "probe": {"variants": ["main", "no_kll"]}})


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
