"""Reasoning Gym items ahead of time: exact totals, narrow tasks, builds that were killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from prorl_nemo.data.build import build
from prorl_nemo.data.logic_items import share
from prorl_nemo.data.record import Record
from prorl_nemo.data.shards import record_of
from prorl_nemo.errors import RecipeError
from prorl_nemo.recipe import parse_recipe


def run(folder: Path, source: dict[str, Any], held_out: int = 3) -> dict[str, Any]:
    raw = {
        "name": "logic",
        "model": "unused",
        "stages": [{"steps": 1}],
        "data": {
            "build": {"folder": str(folder), "sources": [source], "held_out": held_out},
            "sources": [{"kind": "built", "domain": "logic"}],
        },
    }
    return build(parse_recipe(raw), Console(quiet=True))


def records(folder: Path, split: str) -> list[Record]:
    files = folder.glob(f"logic-{split}-*.parquet")
    return [record_of(row) for file in files for row in pq.read_table(file).to_pylist()]


def test_logic_items_go_on_after_a_kill(tmp_path: Path) -> None:
    tasks = {"chain_sum": {"min_terms": 2, "max_terms": 2, "max_digits": 1}, "spell_backward": {}}
    source = {"source": "reasoning_gym", "limit": 400, "tasks": tasks}
    whole = run(tmp_path / "whole", source)
    # As a kill leaves it: fewer lines, the last of them torn.
    shutil.copytree(tmp_path / "whole" / ".parts", tmp_path / "cut" / ".parts")
    for file in (tmp_path / "cut" / ".parts" / "reasoning_gym").iterdir():
        text = file.read_bytes()
        file.write_bytes(text[: len(text) // 3])
    again = run(tmp_path / "cut", source)
    assert again["shards"] == whole["shards"]
    # chain_sum has fewer than 200 different questions of one digit for training.
    narrow = whole["sources"][0]["tasks_without_more_questions"]
    assert list(narrow) == ["chain_sum"] and narrow["chain_sum"] < 200
    assert whole["tasks"]["logic"]["spell_backward"]["train"] == 400 - narrow["chain_sum"]
    train, held_out = records(tmp_path / "whole", "train"), records(tmp_path / "whole", "held_out")
    assert len({r.digest for r in train + held_out}) == len(train) + len(held_out) == 406


def test_an_unknown_logic_task(tmp_path: Path) -> None:
    source = {"source": "reasoning_gym", "limit": 2, "tasks": {"chain_sun": {}}}
    with pytest.raises(RecipeError, match="reasoning_gym task chain_sun: unknown task"):
        run(tmp_path / "out", source)


@pytest.mark.parametrize(
    ("most", "count", "level"),
    [([None] * 96, 37000, 386), ([10, None, None], 100, 45), ([10, 20], 100, 20), ([5, 9], 10, 5)],
)
def test_the_equal_share(most: list[int | None], count: int, level: int) -> None:
    assert share(most, count) == level
    # The least level that gives enough, found the slow way.
    for tried in range(level + 1):
        total = sum(tried if bound is None else min(bound, tried) for bound in most)
        assert total < count or tried == level
