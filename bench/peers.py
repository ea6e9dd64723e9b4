"""A whole step against TRL's GRPOTrainer: same model, prompts, samples and limits, same machine.

A step is: 8 prompts x 8 samples of the quickstart generated, log-probs under old policy and
reference, four optimizer updates, and here the new weights into the engine. TRL is installed into
an environment of its own (`build/peers`, kept for the next time). The first step of each warms up.
Dynamic sampling is left out: TRL has none. Lengths are those the same model chooses, and reported.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prorl_nemo.model_source import resolve_model
from prorl_nemo.recipe import Recipe, load_recipe
from prorl_nemo.records import Prompt
from prorl_nemo.rollout.dynamic_sampler import DynamicSampler
from prorl_nemo.rollout.group_collector import Sampling
from prorl_nemo.training.batch import StepSettings
from prorl_nemo.training.check_batch import made_up_batch
from prorl_nemo.training.session import Session, open_session

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
TRL = "trl==1.16.0"
STEPS = 1


def trl_python() -> Path:
    """The interpreter of TRL's environment, made if need be; torch and transformers as pinned."""
    folder = ROOT / "build" / "peers" / TRL.replace("==", "-")
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        pins = ROOT / "requirements" / "constraints.txt"
        command = [python, "-m", "pip", "install", "--quiet", "--constraint", pins, TRL, "torch"]
        subprocess.run(command, check=True)
        ready.touch()
    return python


def theirs(recipe: Recipe, model: Path, prompts: list[Prompt], threads: int) -> dict[str, Any]:
    python = trl_python()
    work = {
        "model": str(model),
        "prompts": [prompt.messages for prompt in prompts],
        "samples": recipe.rollout.samples_per_prompt,
        "updates": recipe.algorithm.minibatches,
        "max_tokens": recipe.rollout.max_response_tokens,
        "temperature": recipe.rollout.temperature,
        "beta": recipe.algorithm.kl.coefficient,
        "learning_rate": recipe.policy.optimizer.learning_rate,
        "threads": threads,
        "steps": STEPS,
    }
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "work.json"), Path(folder, "result.json")
        files[0].write_text(json.dumps(work))
        script = Path(__file__).with_name("trl_step.py")
        # From another folder, or Python would find this project's packages.
        command = [str(python), str(script), *map(str, files)]
        subprocess.run(command, check=True, cwd=folder, env=environment, stdout=sys.stderr)
        found: dict[str, Any] = json.loads(files[1].read_text())
    return found


def ours(session: Session, prompts: list[Prompt]) -> dict[str, Any]:
    recipe, policy = session.recipe, session.policy
    rollout = recipe.rollout
    sampling = Sampling(
        rollout.samples_per_prompt, rollout.temperature, rollout.max_response_tokens
    )
    settings = StepSettings(
        recipe.policy.optimizer.learning_rate,
        recipe.algorithm.clip_low,
        recipe.algorithm.clip_high,
        recipe.algorithm.minibatches,
    )
    found: dict[str, Any] = {"seconds": [], "response_tokens": [], "generate_seconds": []}
    for step in range(STEPS + 1):
        started = time.monotonic()
        sampler = DynamicSampler(
            session.fleet, session.graders, session.prompts.stream, recipe.seed + step
        )
        groups = sampler.sample_all([(prompt, 0) for prompt in prompts], sampling)
        generated = time.monotonic()
        batch = made_up_batch(groups, rollout.temperature)
        batch.old_logprobs, _ = policy.logprobs(batch)
        batch.reference_logprobs, _ = policy.logprobs(batch, "reference")
        policy.train(batch, settings)
        session.sync_weights(step + 1)
        if step:
            found["seconds"].append(time.monotonic() - started)
            found["generate_seconds"].append(generated - started)
            ends = sum(not s.truncated for group in groups for s in group.samples)
            found["response_tokens"].append(batch.response_tokens - ends)
    return found | {"prompt_tokens": [len(prompt.token_ids) for prompt in prompts]}


def main(json_path: Path | None) -> None:
    """Run the bench, print its table and write the figures to `json_path`."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(RECIPE, [f"runs_dir={folder}"])
        model = resolve_model(recipe.model)
        with open_session(recipe, model, lambda event, details: None) as session:
            prompts = session.prompts.validation
            # Every n-th, so that all tasks are there: they are listed one after the other.
            prompts = prompts[:: len(prompts) // recipe.rollout.prompts_per_step]
            prompts = prompts[: recipe.rollout.prompts_per_step]
            here = ours(session, prompts)
        print(f"prorl_nemo: {here['seconds']} s; TRL takes minutes a step", flush=True)
        there = theirs(recipe, model, prompts, os.cpu_count() or 1)
    assert here["prompt_tokens"] == there["prompt_tokens"], "the prompts are not rendered alike"
    means = [statistics.fmean(side["seconds"]) for side in (here, there)]
    report = {
        "recipe": "recipes/quickstart.yaml",
        "prompts": len(prompts),
        "samples": recipe.rollout.samples_per_prompt,
        "updates": recipe.algorithm.minibatches,
        "prorl_nemo": here,
        "trl": there,
        "times_faster": means[1] / means[0],
    }
    table = Table(title=f"one step of {report['recipe']}, mean of {STEPS}")
    for column in ("", "seconds", "response tokens"):
        table.add_column(column, justify="right")
    for name, side, mean in zip(("prorl_nemo", TRL), (here, there), means, strict=True):
        table.add_row(name, f"{mean:.1f}", f"{statistics.fmean(side['response_tokens']):.0f}")
    table.add_row("times faster", f"{report['times_faster']:.1f}", "")
    Console().print(table)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(report, indent=1) + "\n")
