"""What `rollout.deterministic` costs: steps that wait for the longest response of each wave.

Simulated: one imagined engine (bench/simulated_engine.py: log-normal response lengths up to 8192
tokens, 256 sequences at a time) fills batches of 64 groups of 16 in both modes. The groups are the
same; what differs is how long the engine idles, and what it generates beyond the batch.
Real: the smoke recipe's tiny model, trained for some steps in both modes.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.simulated_engine import SimulatedFleet, SimulatedGrader, SimulatedPrompts, World
from prorl_nemo.model_source import resolve_model
from prorl_nemo.recipe import load_recipe
from prorl_nemo.rollout.dynamic_sampler import DynamicSampler
from prorl_nemo.rollout.group_collector import Sampling
from prorl_nemo.training.live_view import LiveView
from prorl_nemo.training.loop import Trainer
from prorl_nemo.training.metrics import METRICS, RunLog, read_rows
from prorl_nemo.training.run_state import Checkpoints
from prorl_nemo.training.session import open_session

RECIPE = Path(__file__).parents[1] / "recipes" / "smoke" / "resets.yaml"
GROUPS = 64
SAMPLING = Sampling(samples_per_prompt=16, temperature=1.2, max_response_tokens=8192)
KEEP_RATES = (0.9, 0.6, 0.41, 0.2)
STEPS = 3
WARM_UP, REAL_STEPS = 2, 10


@dataclass(frozen=True)
class Row:
    """Means over steps: seconds and generated tokens of filling a batch."""

    keep_rate: float | None
    deterministic: bool
    generate_seconds: float
    generated_tokens: float
    step_seconds: float | None = None


def simulated(keep_rate: float, deterministic: bool) -> Row:
    fleet = SimulatedFleet(World(keep_rate=keep_rate), 1, slots=256)
    sampler = DynamicSampler(
        fleet, SimulatedGrader(), SimulatedPrompts(), 1, lockstep=deterministic
    )
    sampler.sample_batch(GROUPS, SAMPLING)  # The first batch learns the keep rate.
    start, tokens = fleet.now, fleet.generated_tokens
    for _ in range(STEPS):
        sampler.sample_batch(GROUPS, SAMPLING)
    return Row(
        keep_rate,
        deterministic,
        (fleet.now - start) / STEPS,
        (fleet.generated_tokens - tokens) / STEPS,
    )


def real(deterministic: bool) -> Row:
    """Medians of real steps: other work on the machine makes some of them slow."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(
            RECIPE,
            [
                f"runs_dir={folder}",
                f"rollout.deterministic={str(deterministic).lower()}",
                f"stages=[{{steps: {WARM_UP + REAL_STEPS + 1}}}]",
                "validation.at_start=false",
                "validation.interval=1000",
                "checkpoint.interval=1000",
            ],
        )
        view = LiveView("bench deterministic", recipe.model, recipe.total_steps)
        with (
            view,
            RunLog(recipe.run_dir) as log,
            open_session(
                recipe, resolve_model(recipe.model), lambda event, details: None, view.phase
            ) as session,
        ):
            checkpoints = Checkpoints(recipe.run_dir / "checkpoints", 1)
            trainer = Trainer(session, log, view, checkpoints, lambda seconds: None)
            for _ in range(WARM_UP + REAL_STEPS):
                trainer.train_step()
            checkpoints.close()
        rows = read_rows(recipe.run_dir / METRICS)[WARM_UP:]
    return Row(
        None,
        deterministic,
        statistics.median(row["time/generate"] for row in rows),
        statistics.fmean(row["rollout/generated_tokens"] for row in rows),
        statistics.median(row["time/step"] for row in rows),
    )


def main(json_path: Path | None) -> None:
    """Run the bench, print its table and write the figures to `json_path`."""
    modes = (False, True)
    rows = [simulated(rate, mode) for rate in KEEP_RATES for mode in modes]
    rows += [real(mode) for mode in modes]
    table = Table(title=f"{GROUPS} groups of {SAMPLING.samples_per_prompt} a step; real: 4 of 8")
    for column in ("keep rate", "deterministic", "generate, s", "tokens", "step, s"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            "real" if row.keep_rate is None else f"{row.keep_rate:.2f}",
            "yes" if row.deterministic else "no",
            f"{row.generate_seconds:.2f}",
            f"{row.generated_tokens:,.0f}",
            "" if row.step_seconds is None else f"{row.step_seconds:.2f}",
        )
    Console().print(table)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
