"""`prorl check --tiny` as a user runs it, for every recipe but the study's: those of 32 GPUs and
models of 4B, on this machine. The study's model is small; its runs are checked as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prorl_nemo.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = [path.relative_to(ROOT) for path in sorted((ROOT / "recipes").glob("**/*.yaml"))]
RECIPES = [path for path in RECIPES if "study" not in path.parts]
QWEN = Path("recipes/qwen3_4b/v2.yaml")


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_recipe(recipe: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.json"
    command = [sys.executable, "-m", "prorl_nemo.cli", "check", str(ROOT / recipe), "--tiny"]
    done = subprocess.run(
        [*command, "--json", str(lines)], capture_output=True, text=True, cwd=tmp_path, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = {line["name"] for line in json.loads(lines.read_text())}
    # Every domain is graded, the layout's gradient is that of one rank, the engine has its weights.
    for source in load_recipe(ROOT / recipe).data.sources:
        graded = f"({source.domain})" if source.domain else f"grader: {source.task} (logic)"
        assert any(graded in name for name in names), (source, names)
    assert "gradient norm against one rank and one micro-batch" in names
    assert "engine log-probs against the trainer's, after an update" in names
    if recipe == QWEN:
        assert "bf16, TP 2, SP" in done.stdout
    assert not list(tmp_path.glob("runs*"))


def test_the_recipe_with_tensor_parallelism_is_among_them() -> None:
    assert QWEN in RECIPES
