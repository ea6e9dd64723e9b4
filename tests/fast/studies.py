"""A study in a folder of its own, and results of it, as the tests of studies need them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from prorl_nemo.recipe import Recipe, parse_recipe
from prorl_nemo.study.compact import (
    FORMAT,
    write_result,
)
from prorl_nemo.study.plan import Study


def small_recipe(folder: Path, **changes: Any) -> Recipe:
    raw = {
        "name": "study-main-seed1",
        "model": str(folder / "model"),
        "runs_dir": str(folder / "runs"),
        "data": {"sources": [{"task": "chain_sum"}, {"task": "aiw", "train": False}]},
        "stages": [{"steps": 300}],
    }
    return parse_recipe({**raw, **changes})


def study(folder: Path) -> Study:
    """A study whose recipe lies in the folder, and its results in `results/`."""
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        recipe.write_text(json.dumps(small_recipe(folder).model_dump(mode="json")))
    short = "stages=[{steps: 200}]"
    variants = [
        {"name": "main", "question": "All of it"},
        {
            "name": "no_kl",
            "question": "Without KL",
            "overrides": ["algorithm.kl.coefficient=0.0", short],
            "expected": "lower",
        },
        {"name": "absent", "question": "Not run"},
    ]
    raw = {
        "pretraining": "p",
        "model": str(folder / "model"),
        "recipe": str(recipe),
        "results": str(folder / "results"),
        "variants": variants,
    }
    return Study.model_validate({**raw, "compare_at": 200, "probe": {"samples": 256}})


def write(folder: Path, name: str, seed: int, shift: float = 0.0, **changes: Any) -> Path:
    """A result of the study in the folder."""
    plan = study(folder)
    variant = next(v for v in plan.variants if v.name == name)
    recipe = plan.recipe_of(variant, seed)
    steps = list(range(0, recipe.total_steps + 1, 100))
    prompts = ("reasoning_gym/chain_sum/1", "reasoning_gym/chain_sum/2")
    start, end = dict(zip(prompts, (0, 5))), dict(zip(prompts, (50, 0)))
    asked = {
        "prompts_per_task": 16,
        "samples": 256,
        "response_limit": 64,
        "start": start,
        "end": end,
    }
    firsts = itertools.accumulate((stage.steps for stage in recipe.stages[:-1]), initial=1)
    flat = {
        "pass": 0.9,
        "never_trained/mean": 0.3,
        "never_trained/pass": 0.6,
        "chain_sum": 0.5,
        "pass/chain_sum": 1.0,
        "aiw": 0.25,
        "pass/aiw": 0.75,
        "response_tokens_mean": 20.0,
    }
    tasks = {
        "chain_sum": {"category": "arithmetic", "trained": True},
        "aiw": {"category": "logic", "trained": False},
    }
    row = {
        "format": FORMAT,
        "run": recipe.name,
        "variant": name,
        "seed": seed,
        "model_sha256": "a" * 64,
        "probe": asked if name == "main" else None,
        "recipe": recipe.model_dump(mode="json", exclude={"runs_dir"}),
        "versions": {"vllm": "1"},
        "processor": "p, 2 cores",
        "steps": recipe.total_steps,
        "rows_lost": 0,
        "training_seconds": 600.0,
        "starts": {"begun": 2, "killed": 1, "resumed_at": [100]},
        "tasks": tasks,
        "validation": {
            "step": steps,
            "mean": [0.2 + shift + step / 1000 for step in steps],
            **{key: [value] * len(steps) for key, value in flat.items()},
        },
        "train": {
            "step": [10, 20],
            "policy/kl": [None, 0.1],
            "time/step": [1.0, 2.0],
            "rollout/generated_tokens": [50000.0, 70000.0],
        },
        "events": [
            *(
                {"step": first, "event": "stage_started", "stage": stage}
                for stage, first in enumerate(firsts)
            ),
            {"step": 150, "event": "reference_reset", "trigger": "kl_spike"},
            {"step": 1150, "event": "reference_reset", "trigger": "interval"},
        ],
    }
    file = plan.result_file(name, seed)
    write_result(file, {**row, **changes})
    return file
