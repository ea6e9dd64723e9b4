"""How long training stands still for a checkpoint, in background and without, and what it costs.

Real steps of the quickstart's recipe (model, engine, trainer) in a throw-away run directory, with
a checkpoint after each. The goal: at one save in ten steps, training stands still for at most 3 %
of the time. A step during which a save is written is slower too; that is counted beside it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prorl_nemo.model_source import resolve_model
from prorl_nemo.recipe import load_recipe
from prorl_nemo.training.live_view import LiveView
from prorl_nemo.training.loop import Trainer
from prorl_nemo.training.metrics import METRICS, RunLog, read_rows
from prorl_nemo.training.run_state import Checkpoints
from prorl_nemo.training.session import open_session

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
STEPS_PER_SAVE = 10
GOAL = 0.03
SETTINGS = [
    "validation.at_start=false",
    "validation.interval=1000",
    "checkpoint.interval=1000",
    "checkpoint.background=true",
]


def main(json_path: Path | None) -> None:
    """Run the bench, print its table and write the figures to `json_path`."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(RECIPE, [f"runs_dir={folder}", *SETTINGS])
        model = resolve_model(recipe.model)
        view = LiveView("bench checkpoint", recipe.model, 4)
        with (
            view,
            RunLog(recipe.run_dir) as log,
            open_session(recipe, model, lambda event, details: None, view.phase) as session,
        ):
            checkpoints = Checkpoints(recipe.run_dir / "checkpoints", 1)
            trainer = Trainer(session, log, view, checkpoints, lambda seconds: None)
            trainer.train_step()  # Warms up.
            trainer.train_step()
            begun = time.monotonic()
            trainer.save()
            blocked = time.monotonic() - begun
            trainer.train_step()  # While it is written.
            trainer.checkpoints.wait()
            trainer.train_step()
            begun = time.monotonic()
            trainer.save(last=True)
            waited = time.monotonic() - begun
            size = sum(f.stat().st_size for f in checkpoints.path(4).rglob("*") if f.is_file())
            begun = time.monotonic()
            checkpoints.verify(4)
            verified = time.monotonic() - begun
            checkpoints.close()
        rows = [r for r in read_rows(recipe.run_dir / METRICS) if r["kind"] == "train"]
    figures = _figures([row["time/step"] for row in rows], blocked, waited, size, verified)
    Console().print(_table(figures))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(figures, indent=1) + "\n")


def _figures(
    steps: list[float], blocked: float, waited: float, size: int, verified: float
) -> dict[str, Any]:
    step = statistics.fmean([steps[1], steps[3]])
    # What a save costs in all: training stands still, and is slower while it is written.
    lost = blocked + max(0.0, steps[2] - step)
    return {
        "recipe": "recipes/quickstart.yaml",
        "checkpoint_mib": size / 2**20,
        "step_seconds": step,
        "step_seconds_while_written": steps[2],
        "background_blocked_seconds": blocked,
        "foreground_blocked_seconds": waited,
        "verify_seconds": verified,
        "background_share": blocked / (STEPS_PER_SAVE * step + blocked),
        "background_lost_share": lost / (STEPS_PER_SAVE * step + lost),
        "foreground_share": waited / (STEPS_PER_SAVE * step + waited),
        "goal": GOAL,
    }


def _table(figures: dict[str, Any]) -> Table:
    table = Table(title=f"a checkpoint of {figures['checkpoint_mib']:,.0f} MiB")
    table.add_column("")
    table.add_column("background", justify="right")
    table.add_column("foreground", justify="right")
    table.add_row(
        "training stands still, s",
        f"{figures['background_blocked_seconds']:.2f}",
        f"{figures['foreground_blocked_seconds']:.2f}",
    )
    table.add_row(
        f"share of the time at one save in {STEPS_PER_SAVE} steps (goal {GOAL:.0%})",
        f"{figures['background_share']:.2%}",
        f"{figures['foreground_share']:.2%}",
    )
    table.add_row(
        "the same, with what the next step takes longer",
        f"{figures['background_lost_share']:.2%}",
        f"{figures['foreground_share']:.2%}",
    )
    table.add_section()
    table.add_row("a step, s", f"{figures['step_seconds']:.1f}", "")
    table.add_row(
        "a step while a save is written, s", f"{figures['step_seconds_while_written']:.1f}", ""
    )
    table.add_row("all sums compared at a resume, s", f"{figures['verify_seconds']:.1f}", "")
    return table
