"""`--tiny`: a recipe made small enough for two CPU cores, to prove what does not depend on size.

A random model of the same family takes the model's place; tensor, pipeline and context parallelism
keep at most two ranks, data parallelism one; responses have some tokens, and data that was not
built is made up, one small task of each domain. Algorithm, shaping, stages, reset rules, precision
and graders stay the recipe's. FP8 and kernels that need a GPU are left out, and said to be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prorl_nemo.data.record import Record
from prorl_nemo.data.shards import FORMAT, ShardWriter, write_manifest
from prorl_nemo.planning.shapes import model_shape
from prorl_nemo.recipe import Recipe, parse_recipe
from prorl_nemo.rewards.gold import known_item
from prorl_nemo.tiny_model import tiny_model

_RESPONSE, _PROMPT = 24, 768
_SAMPLES = 4
_RECORDS, _HELD_OUT = 12, 4
_AXES = ("tensor_parallel", "pipeline_parallel", "context_parallel", "data_parallel")


def shrink(recipe: Recipe, folder: Path) -> tuple[Recipe, list[str]]:
    """The small recipe, and what of the large one it leaves out.

    Args:
        folder: new or empty, for the model and the data; must live as long as the recipe is used.

    Raises:
        ModelError: a model whose shape is not known (see `prorl plan --model`).
    """
    spec = model_shape(recipe.model)
    # As the model's: even, one for all, or such that two ranks have to fill them up.
    kv_heads = 2 if spec.groups % 2 == 0 else min(3, spec.groups)
    model = tiny_model(
        spec.family,  # type: ignore[arg-type]
        folder / "model",
        tied=spec.tied,
        layers=4,
        hidden_size=64 * kv_heads,
        heads=2 * kv_heads,
        kv_heads=kv_heads,
        max_positions=4096,
    )
    settings = recipe.model_dump(mode="json")
    left_out = _policy(settings["policy"])
    settings |= {"name": f"{recipe.name}-tiny", "runs_dir": str(folder / "runs")}
    settings |= {"model": str(model)}
    _rollout(settings, _RESPONSE / recipe.longest_response, max(2, kv_heads))
    _data(settings, folder / "data")
    return parse_recipe(settings), left_out


def _policy(policy: dict[str, Any]) -> list[str]:
    left_out = []
    for axis in _AXES:
        policy[axis] = min(2, policy[axis]) if axis != "data_parallel" else 1
    policy["virtual_pipeline"] = min(2, policy["virtual_pipeline"])
    policy["tokens_per_microbatch"] = min(4096, policy["tokens_per_microbatch"])
    policy["threads"] = 1
    if policy["fp8"]:
        left_out.append(
            f"policy.fp8: {policy['fp8']} needs a GPU; checked in {policy['precision']}"
        )
        policy["fp8"] = None
    if policy["attention"] == "flex":
        left_out.append("policy.attention: flex needs a GPU; checked with sdpa")
        policy["attention"] = "sdpa"
    return left_out


def _rollout(settings: dict[str, Any], scale: float, workers: int) -> None:
    """`scale`: of response limits; `workers`: of an engine at most, which divide its heads."""
    rollout, algorithm = settings["rollout"], settings["algorithm"]
    algorithm["minibatches"] = min(2, algorithm["minibatches"])
    rollout |= {
        "prompts_per_step": 4,
        "samples_per_prompt": _SAMPLES,
        "max_response_tokens": max(4, round(rollout["max_response_tokens"] * scale)),
        "engines": 1,
        "tensor_parallel": min(workers, rollout["tensor_parallel"]),
        "engine_threads": 1,
        "kv_cache_mib": 64,
        "weight_transfer": "host",
        "sleep_in_updates": False,
    }
    for stage in settings["stages"]:
        if stage["max_response_tokens"]:
            stage["max_response_tokens"] = max(4, round(stage["max_response_tokens"] * scale))
        if stage["samples_per_prompt"]:
            stage["samples_per_prompt"] = _SAMPLES
    if settings["shaping"]["overlong"]:
        limits = [stage["max_response_tokens"] for stage in settings["stages"]]
        shortest = min(limit or rollout["max_response_tokens"] for limit in limits)
        settings["shaping"]["overlong"]["buffer_tokens"] = shortest // 4
    settings["validation"] |= {"prompts_per_task": 2, "samples": 1}
    settings["grading"]["workers"] = 1
    settings["checkpoint"] |= {"keep_last": 1, "background": False}


def _data(settings: dict[str, Any], folder: Path) -> None:
    """Built data is made up; tasks of Reasoning Gym stay, with fewer questions."""
    data = settings["data"]
    data["max_prompt_tokens"] = _PROMPT
    made_up: dict[str, list[str]] = {}
    for source in data["sources"]:
        source["size"] = min(100, source["size"])
        if source["kind"] == "built":
            source |= {"folder": str(folder), "size": 2000}
            # An entry without a task takes what no other one names: so there must be more.
            task = source["task"] or f"small_{source['domain']}"
            made_up.setdefault(source["domain"], []).append(task)
    data["build"] = None
    if made_up:
        write_small_data(folder, made_up)


def write_small_data(folder: Path, tasks: dict[str, list[str]]) -> None:
    """Some problems of each domain's tasks in the layout of `prorl data build`, with real
    gradings."""
    folder.mkdir(parents=True)
    shards: list[dict[str, Any]] = []
    for domain, names in sorted(tasks.items()):
        for split, count in (("train", _RECORDS), ("held_out", _HELD_OUT)):
            writer = ShardWriter(folder, domain, split)
            for task in names:
                for number in range(count):
                    grading = _grading(domain, number)
                    problem = f"{task}, problem {number} of {split}: {json.dumps(grading)[:60]}"
                    identity = f"small/{task}/{split}/{number}"
                    writer.write(Record(identity, domain, task, problem, grading))
            writer.close()
            shards += writer.shards
    counts = {"train": _RECORDS, "held_out": _HELD_OUT}
    made = {domain: dict.fromkeys(names, counts) for domain, names in tasks.items()}
    write_manifest(folder, {"format": FORMAT, "tasks": made, "shards": shards})


def _grading(domain: str, number: int) -> dict[str, Any]:
    if domain == "math":
        return {"kind": "math", "answer": str(number + 2)}
    if domain == "stem":
        return {"kind": "multiple_choice", "answer": "ABCD"[number % 4]}
    known = known_item("reasoning_gym" if domain == "logic" else domain)
    assert known is not None
    return known[0]
