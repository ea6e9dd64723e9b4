"""What of an engine's fate ends this start of the processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from prorl_nemo.recipe import load_recipe
from prorl_nemo.training.live_view import LiveView
from prorl_nemo.training.metrics import EVENTS, RunLog, read_rows
from prorl_nemo.training.run import FAULTS, RestartNeeded, _Run
from prorl_nemo.training.run_state import Checkpoints
from prorl_nemo.training.tracking import Tracker

RECIPE = Path(__file__).parents[2] / "recipes" / "smoke" / "resets.yaml"
DETAILS = {"engine": 0, "reason": "died", "resubmitted": 3}


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_new_engine_goes_on_only_where_its_rounding_may_differ(
    tmp_path: Path, deterministic: bool
) -> None:
    settings = [f"runs_dir={tmp_path}", f"rollout.deterministic={str(deterministic).lower()}"]
    recipe = load_recipe(RECIPE, settings)
    recipe.run_dir.mkdir()
    with RunLog(recipe.run_dir) as log, LiveView("run", "model", 1) as view:
        checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
        run = _Run(recipe, tmp_path, checkpoints, log, view, lambda seconds: None, Tracker([]))
        if deterministic:
            with pytest.raises(RestartNeeded, match="deterministic"):
                run._event("engine_restarted", DETAILS)
        else:
            run._event("engine_restarted", DETAILS)
        run._event("prompt_dropped", {"prompt_id": "p", "reason": "too long"})
    assert RestartNeeded in FAULTS
    names = [row["event"] for row in read_rows(recipe.run_dir / EVENTS)]
    assert names == ["engine_restarted", "prompt_dropped"]
