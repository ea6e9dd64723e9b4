"""Where a training step of the quickstart spends its time; what shared prompts and packing gain.

Real steps of the real recipe (model, engine, trainer) in a throw-away run directory. The first
step warms up and is not counted. Shared prompts are measured on the quickstart's own prompts,
packing on a mix of lengths (padded_rows.py).
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from bench.padded_rows import measure
from prorl_nemo.cluster.policy_group import PolicyGroup
from prorl_nemo.model_source import resolve_model
from prorl_nemo.recipe import load_recipe
from prorl_nemo.rollout.group_collector import Sampling
from prorl_nemo.training.batch import StepSettings, TrainingBatch
from prorl_nemo.training.check_batch import made_up_batch
from prorl_nemo.training.live_view import LiveView
from prorl_nemo.training.loop import Trainer
from prorl_nemo.training.metrics import METRICS, RunLog, read_rows
from prorl_nemo.training.run_state import Checkpoints
from prorl_nemo.training.session import Session, open_session, start_ray

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
PHASES = ("generate", "logprobs", "reference", "train", "sync")
STEPS = 3


def main(json_path: Path | None) -> None:
    """Run the bench, print its tables and write the figures to `json_path`."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(
            RECIPE, [f"runs_dir={folder}", "validation.at_start=false", "validation.interval=1000"]
        )
        model = resolve_model(recipe.model)
        view = LiveView("bench step", recipe.model, STEPS)
        with (
            view,
            RunLog(recipe.run_dir) as log,
            open_session(recipe, model, lambda event, details: None, view.phase) as session,
        ):
            checkpoints = Checkpoints(recipe.run_dir / "checkpoints", 1)
            trainer = Trainer(session, log, view, checkpoints, lambda seconds: None)
            for _ in range(STEPS):
                trainer.train_step()
            batch = _batch(session, trainer)
            shared = _training_seconds(session.policy, batch)
        rows = [r for r in read_rows(recipe.run_dir / METRICS) if r["kind"] == "train"][1:]
        plain_recipe = recipe.model_copy(deep=True)
        plain_recipe.policy.shared_prompts = False
        plain = _plain_seconds(plain_recipe, model, batch)
        packing = measure(plain_recipe, model)
    figures = _figures(rows, batch, shared, plain) | {"packing": packing}
    console.print(_table(figures))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(figures, indent=1) + "\n")


def _batch(session: Session, trainer: Trainer) -> TrainingBatch:
    """A batch of the recipe's size, sampled by the engine."""
    stage = trainer.stages.at(1)
    prompts = [
        (p, 0) for p in session.prompts.validation[: session.recipe.rollout.prompts_per_step]
    ]
    groups = trainer.sampler.sample_all(
        prompts, Sampling(stage.samples_per_prompt, stage.temperature, stage.max_response_tokens)
    )
    return made_up_batch(groups, stage.temperature)


def _training_seconds(policy: PolicyGroup, batch: TrainingBatch) -> dict[str, float]:
    """Seconds of one log-prob pass and one round of updates; the better of two."""
    settings = StepSettings(0.0, 0.2, 0.28, minibatches=4)
    best: dict[str, float] = {}
    for _ in range(2):
        started = time.monotonic()
        batch.old_logprobs, _ = policy.logprobs(batch)
        middle = time.monotonic()
        batch.reference_logprobs = batch.old_logprobs
        policy.train(batch, settings)
        times = {"logprobs": middle - started, "train": time.monotonic() - middle}
        best = {name: min(t, best.get(name, t)) for name, t in times.items()}
    return best


def _plain_seconds(recipe: Any, model: Path, batch: TrainingBatch) -> dict[str, float]:
    start_ray()
    try:
        policy = PolicyGroup(recipe, model)
        try:
            return _training_seconds(policy, batch)
        finally:
            policy.shutdown()
    finally:
        ray.shutdown()


def _figures(
    rows: list[dict[str, Any]],
    batch: TrainingBatch,
    shared: dict[str, float],
    plain: dict[str, float],
) -> dict[str, Any]:
    seconds = {name: statistics.fmean(row[f"time/{name}"] for row in rows) for name in PHASES}
    generated = statistics.fmean(row["rollout/generated_tokens"] for row in rows)
    trained = statistics.fmean(row["rollout/trained_tokens"] for row in rows)
    prompt_tokens = [len(prompt) for prompt in batch.prompts]
    size = len(batch.groups[0])
    return {
        "recipe": "recipes/quickstart.yaml",
        "steps": len(rows),
        "seconds": seconds,
        "step_seconds": sum(seconds.values()),
        "generated_tokens": generated,
        "trained_tokens": trained,
        "generated_tokens_per_second": generated / seconds["generate"],
        "trained_tokens_per_second": trained
        / (seconds["logprobs"] + seconds["reference"] + seconds["train"]),
        "shared_prompts": {
            "prompt_tokens_mean": statistics.fmean(prompt_tokens),
            "response_tokens": batch.response_tokens,
            "computed_tokens_plain": size * sum(prompt_tokens) + batch.response_tokens,
            "computed_tokens_shared": sum(prompt_tokens) + batch.response_tokens,
            "seconds_plain": plain,
            "seconds_shared": shared,
            "speedup_logprobs": plain["logprobs"] / shared["logprobs"],
            "speedup_train": plain["train"] / shared["train"],
        },
    }


def _table(figures: dict[str, Any]) -> Table:
    table = Table(title=f"one step of {figures['recipe']}, mean of {figures['steps']}")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in figures["seconds"].items():
        table.add_row(name, f"{seconds:.1f}", f"{seconds / figures['step_seconds']:.0%}")
    table.add_section()
    table.add_row("step", f"{figures['step_seconds']:.1f}", "")
    rates = ("generated_tokens_per_second", "trained_tokens_per_second")
    for name in rates:
        table.add_row(name.replace("_", " "), f"{figures[name]:.0f}", "")
    gains = figures["shared_prompts"]
    table.add_row("shared prompts, log-probs", f"{gains['speedup_logprobs']:.2f} x", "")
    table.add_row("shared prompts, updates", f"{gains['speedup_train']:.2f} x", "")
    for name, gain in figures["packing"]["speedup"].items():
        table.add_row(f"packed against {name}", f"{gain:.2f} x", "")
    return table
