"""How far a run is, as the Slurm scripts ask it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prorl_nemo.recipe import load_recipe
from prorl_nemo.training.progress import progress
from prorl_nemo.training.run_dir import open_run_dir

RECIPE = Path(__file__).parents[2] / "recipes" / "smoke" / "two_nodes.yaml"


@pytest.mark.parametrize(
    ("events", "finished"),
    [
        ([], False),
        (["run_started", "stopped"], False),
        (["run_started", "stopped", "resumed", "checkpoint_saved", "finished"], True),
        # A run that was finished, then made longer and resumed.
        (["run_started", "finished", "resumed", "stage_started"], False),
    ],
)
def test_progress(tmp_path: Path, events: list[str], finished: bool) -> None:
    recipe = load_recipe(RECIPE, [f"runs_dir={tmp_path}"])
    for step in (5, 10):
        (recipe.run_dir / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    lines = [json.dumps({"event": name}) for name in events]
    (recipe.run_dir / "events.jsonl").write_text("\n".join([*lines, '{"event": "fin']))
    assert progress(recipe) == (finished, 10)


def test_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "prorl_nemo.training.progress", str(RECIPE)]
    good = subprocess.run([*command, f"runs_dir={tmp_path}"], capture_output=True, text=True)
    assert (good.returncode, good.stdout) == (0, "unfinished 0 two-nodes\n")
    bad = subprocess.run([*command, "polcy=1"], capture_output=True, text=True)
    assert bad.returncode == 2 and "polcy" in bad.stderr and "Traceback" not in bad.stderr


def test_another_recipe_than_the_run_began_with_is_refused(tmp_path: Path) -> None:
    """Before nodes are started, and not taken for finished: the longer run is another one."""
    recipe = load_recipe(RECIPE, [f"runs_dir={tmp_path}"])
    with open_run_dir(recipe):
        (recipe.run_dir / "metrics.jsonl").write_text('{"step": 30}\n')
    (recipe.run_dir / "events.jsonl").write_text('{"event": "finished"}\n')
    command = [sys.executable, "-m", "prorl_nemo.training.progress", str(RECIPE)]
    command += [f"runs_dir={tmp_path}"]
    same = subprocess.run([*command, "grading.workers=2"], capture_output=True, text=True)
    assert (same.returncode, same.stdout) == (0, "finished 0 two-nodes\n"), same.stderr
    other = subprocess.run([*command, "stages=[{steps: 60}]"], capture_output=True, text=True)
    assert other.returncode == 2 and "was begun with another recipe" in other.stderr
