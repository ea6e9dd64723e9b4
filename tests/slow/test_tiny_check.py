"""`prorl check --tiny` for every recipe but the study's: those of 32 GPUs and models of 4B, on this
machine. The study's model is small; its runs are checked as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prorl_nemo.cli import app
from prorl_nemo.recipe import load_recipe
from prorl_nemo.shrink import shrink
from prorl_nemo.training.stage_rules import recipe_stages

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = {str(path.relative_to(FOLDER)) for path in FOLDER.glob("**/*.yaml")}
RECIPES = {name for name in RECIPES if not name.startswith("study/")}
QWEN = "qwen3_4b/v2.yaml"
# Small, these are what another one is, but for the settings named: a GPU's memory, or what others
# that are checked have as well. `make check-recipes` checks them too.
LIKE: dict[str, tuple[str, set[str]]] = {
    "nemotron_1.5b/v2.yaml": (
        "nemotron_1.5b/v2_8gpus.yaml",
        {"rollout.max_response_tokens", "first_stage.max_response_tokens"},
    ),
    "nemotron_1.5b/v2_from_base.yaml": ("nemotron_1.5b/v2_8gpus.yaml", set()),
    "nemotron_1.5b/v2_b200.yaml": ("nemotron_1.5b/v2_8gpus.yaml", {"policy.recompute"}),
    "smoke/h100.yaml": (
        "quickstart.yaml",
        {
            "policy.tokens_per_microbatch",
            "rollout.gpu_memory_share",
            "rollout.verify_weights_every",
        },
    ),
    "smoke/two_nodes.yaml": (
        "smoke/resets.yaml",
        {
            "data.sources",  # One of its two.
            "rollout.deterministic",
            "rollout.max_response_tokens",
            "first_stage.max_response_tokens",
        },
    ),
}


@pytest.mark.parametrize("name", sorted(RECIPES - LIKE.keys()))
def test_every_recipe(
    name: str, one_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["check", str(FOLDER / name), "--tiny", "--json", "lines.json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, (done.output, done.exception)
    lines = {line["name"] for line in json.loads(Path("lines.json").read_text())}
    # Every domain is graded, the layout's gradient is that of one rank, the engine has its weights.
    for source in load_recipe(FOLDER / name).data.sources:
        graded = f"({source.domain})" if source.domain else f"grader: {source.task} (logic)"
        assert any(graded in line for line in lines), (source, lines)
    assert "gradient norm against one rank, one sequence at a time" in lines
    assert "engine log-probs against the trainer's, after an update" in lines
    if name == QWEN:
        assert "bf16, TP 2, SP" in done.output
    assert not list(tmp_path.glob("runs*"))


def test_the_recipe_with_tensor_parallelism_is_among_them() -> None:
    assert QWEN in RECIPES - LIKE.keys()


def what_a_check_reads(name: str, folder: Path) -> dict[str, Any]:
    small, _ = shrink(load_recipe(FOLDER / name), folder)
    sections = {"policy", "algorithm", "rollout", "data", "grading"}
    settings = small.model_dump(mode="json", include=sections)
    stage = recipe_stages(small).at(1)
    settings["first_stage"] = {
        key: getattr(stage, key) for key in ("temperature", "max_response_tokens")
    }
    del settings["policy"]["optimizer"]
    settings["model"] = json.loads((Path(small.model) / "config.json").read_text())
    # Both folders hold the same under other names.
    settings = json.loads(json.dumps(settings).replace(str(folder), ""))
    return {
        f"{s}.{key}": value for s, section in settings.items() for key, value in section.items()
    }


@pytest.mark.parametrize("name", LIKE)
def test_the_others_are_small_what_these_are(name: str, tmp_path: Path) -> None:
    like, but_for = LIKE[name]
    assert like in RECIPES - LIKE.keys()
    here, there = what_a_check_reads(name, tmp_path / "a"), what_a_check_reads(like, tmp_path / "b")
    assert {key for key in here.keys() | there.keys() if here.get(key) != there.get(key)} == but_for
    if "data.sources" in but_for:
        assert all(source in there["data.sources"] for source in here["data.sources"])
