"""What is kept of a run, and which results belong together."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from studies import small_recipe, study, write

from prorl_nemo.errors import UserError
from prorl_nemo.recipe import parse_recipe
from prorl_nemo.study.compact import (
    CURVES,
    compact,
    read_result,
    starts,
    stretches,
    write_result,
)
from prorl_nemo.study.first_model import FirstModel, hold
from prorl_nemo.study.plan import load_study
from prorl_nemo.study.results import read_results
from prorl_nemo.training.metrics import RunLog

ROOT = Path(__file__).parents[2]


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


def test_a_result_of_three_thousand_steps_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tens of kilobytes, so that it can be committed."""
    rng = random.Random(0)
    monkeypatch.chdir(ROOT)
    recipe = load_study(Path("recipes/study/study.yaml")).main_recipe
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
