"""Recipes of `prorl data build`, rows for them, and what was built. For tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from prorl_nemo.data.build import build
from prorl_nemo.data.built_source import BuiltData
from prorl_nemo.data.record import Record
from prorl_nemo.recipe import Recipe, parse_recipe

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def problem(number: int) -> str:
    return f"A farmer owns {number} goats and sells {NUMBERS[number % 10]}; how many are left?"


def deepscaler(count: int = 40) -> list[dict[str, Any]]:
    return [{"problem": problem(i), "answer": str(i), "solution": "s"} for i in range(count)]


def eurus(index: int, tests: dict[str, Any], **changes: Any) -> dict[str, Any]:
    question = f"Task {index}: add the numbers.\n\nWrite Python code to solve the problem. Present "
    row = {
        "data_source": "taco",
        "ability": "code",
        "prompt": [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": question + "the code in \n```python\nYour code\n```\n"},
        ],
        "reward_model": {"style": "rule", "ground_truth": json.dumps(tests)},
        "extra_info": {"split": "train", "index": index},
    }
    return row | changes


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe(folder: Path, sources: list[dict[str, Any]], **changes: Any) -> Recipe:
    domains = {"deepscaler": "math", "dapo_math": "math", "eurus_code": "code", "scp": "stem"}
    domains |= {"nemotron_instructions": "instructions", "reasoning_gym": "logic"}
    domains |= {"records": "math"}
    used = dict.fromkeys(domains[source["source"]] for source in sources)
    return parse_recipe(
        {
            "name": "build",
            "model": "unused",
            "stages": [{"steps": 1}],
            "validation": {"prompts_per_task": 2},
            "data": {
                "build": {"folder": str(folder), "sources": sources, **changes},
                "sources": [{"kind": "built", "domain": domain} for domain in used],
            },
        }
    )


def run(recipe: Recipe) -> dict[str, Any]:
    return build(recipe, Console(quiet=True))


def records(folder: Path, split: str = "train") -> list[Record]:
    data = BuiltData(folder, "test")
    found = []
    for domain, tasks in data.manifest["tasks"].items():
        names, places = data.rows(domain, split, set(tasks))
        found += [data.record(names[shard], group, row) for shard, group, row in places.tolist()]
    return found


def read_one(tmp_path: Path, source: str, name: str, row: dict[str, Any]) -> Record:
    """The record of a single row."""
    write_lines(tmp_path / "in" / name, [row])
    run(recipe(tmp_path / "out", [{"source": source, "path": str(tmp_path / "in")}]))
    (found,) = records(tmp_path / "out")
    return found


def own(number: int, domain: str = "math", **changes: Any) -> dict[str, Any]:
    grading = {"kind": "math", "answer": str(number)}
    return {"domain": domain, "task": "goats", "problem": problem(number), "grading": grading} | (
        changes
    )
