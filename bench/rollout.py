"""Generation through the fleet against vLLM's own offline `generate`, same prompts, same run.

Both engines have the same settings and live side by side, each idle while the other works; rounds
alternate so that a change of the machine's load meets both, and begin with empty prefix caches.
What is compared is the best round of each: other work on the machine makes rounds slower, never
faster. The fleet does more: a seed, a log-probability for every token, results as they finish.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from prorl_nemo.data.chat import load_tokenizer
from prorl_nemo.data.prompts import load_prompts
from prorl_nemo.model_source import resolve_model
from prorl_nemo.recipe import load_recipe
from prorl_nemo.rollout.engine_settings import EngineSettings, engine_arguments
from prorl_nemo.rollout.fleet import Fleet
from prorl_nemo.rollout.protocol import GenerationRequest
from prorl_nemo.training.session import start_ray

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
PROMPTS = 16
SAMPLES = 8
MAX_TOKENS = 24
ROUNDS = 6


@ray.remote
class Offline:
    """vLLM's `LLM` as a user would call it."""

    def __init__(self, settings: EngineSettings) -> None:
        from vllm import LLM

        self.llm = LLM(**engine_arguments(settings))

    def generate(self, prompts: list[list[int]], temperature: float) -> tuple[int, float]:
        """Response tokens and seconds."""
        from vllm import SamplingParams

        parameters = SamplingParams(n=SAMPLES, temperature=temperature, max_tokens=MAX_TOKENS)
        self.llm.reset_prefix_cache()
        started = time.monotonic()
        outputs = self.llm.generate(
            [{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False
        )
        tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
        return tokens, time.monotonic() - started


def through_fleet(
    fleet: Fleet, prompts: list[list[int]], temperature: float, number: int
) -> tuple[int, float]:
    """Response tokens and seconds."""
    requests = [
        GenerationRequest(f"{number}.{i}.{j}", prompt, 1000 * i + j, temperature, MAX_TOKENS)
        for i, prompt in enumerate(prompts)
        for j in range(SAMPLES)
    ]
    fleet.reset_prefix_cache()
    started = time.monotonic()
    fleet.submit(requests)
    tokens, missing = 0, len(requests)
    while missing:
        results = fleet.poll(1.0)
        tokens += sum(len(result.token_ids) for result in results)
        missing -= len(results)
    return tokens, time.monotonic() - started


def main(json_path: Path | None) -> None:
    """Run the bench, print its table and write the figures to `json_path`."""
    recipe = load_recipe(RECIPE)
    folder = resolve_model(recipe.model)
    settings = EngineSettings.from_recipe(recipe, folder)
    drawn = load_prompts(recipe, load_tokenizer(folder), lambda prompt_id, reason: None)
    prompts = [p.token_ids for p in drawn.validation]
    start_ray()
    rates: dict[str, list[float]] = {"offline": [], "fleet": []}
    try:
        environment: dict[str, Any] = {"env_vars": settings.environment()}
        offline = Offline.options(num_cpus=0, runtime_env=environment).remote(settings)
        fleet = Fleet(settings, 1)
        temperature = recipe.rollout.temperature
        for number in range(ROUNDS + 1):
            first = number * PROMPTS % len(prompts)
            batch = (prompts[first:] + prompts)[:PROMPTS]
            contestants = {
                "offline": lambda batch=batch: ray.get(offline.generate.remote(batch, temperature)),
                "fleet": lambda batch=batch, n=number: through_fleet(fleet, batch, temperature, n),
            }
            # Who goes first changes: that one may find the machine busy or its caches cold.
            for name in sorted(contestants, reverse=bool(number % 2)):
                tokens, seconds = contestants[name]()
                if number:  # Round 0 warms up.
                    rates[name].append(tokens / seconds)
        fleet.shutdown()
    finally:
        ray.shutdown()
    best = {name: max(values) for name, values in rates.items()}
    report = {
        "model": recipe.model,
        "precision": settings.dtype,
        "prompts": PROMPTS,
        "samples": SAMPLES,
        "max_tokens": MAX_TOKENS,
        "tokens_per_second": rates,
        "best": best,
        "fleet_over_offline": best["fleet"] / best["offline"],
        "fleet_over_offline_median": statistics.median(rates["fleet"])
        / statistics.median(rates["offline"]),
    }
    table = Table(title=f"{PROMPTS} prompts x {SAMPLES} samples, {recipe.model}")
    for column in ("", "tokens/s, best", "rounds"):
        table.add_column(column, justify="right")
    for name, values in rates.items():
        table.add_row(name, f"{best[name]:.0f}", " ".join(f"{v:.0f}" for v in values))
    table.add_row("fleet / offline", f"{report['fleet_over_offline']:.2f}", "")
    Console().print(table)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(report, indent=1) + "\n")
