"""Graded responses per second for each domain, clean and with 1 % hostile, beside the peers.

Math uses the gold answers of MATH-500 and instructions the prompts of IFEval from the folder
PRORL_TEST_DATA (default ../shared/data); without it, a few built-in ones of the same kinds.
The peers are math-verify called directly, in one process and with its own timeouts, and
verl's code scorer where verl is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from prorl_nemo.rewards.pool import GraderPool
from prorl_nemo.rewards.sandbox.probe import working_backend

Item = tuple[dict[str, Any], str]
WORKERS = 2
RESPONSE_CHARACTERS = 64_000  # 16K tokens
MEMORY_GRADINGS = 100_000
LOGIC_TASKS = (
    "basic_arithmetic", "leg_counting", "syllogism", "caesar_cipher", "countdown", "n_queens",
    "graph_color", "spell_backward", "family_relationships", "mini_sudoku", "tower_of_hanoi",
    "knights_knaves", "letter_counting", "simple_equations", "maze", "bitwise_arithmetic",
)  # fmt: skip
# Each would hang or swell a grader that computes it.
HOSTILE_MATH = ("9^{9^{9}}", "(x+1)^{100000}", "99999!", r"\sum_{n=1}^{10^9} n^{n}", "(" * 300)
HOSTILE_LOGIC = ("9**9**9", "__import__('time').sleep(60)", "1e999999999", "[" * 5000)


def main(json_path: Path | None) -> None:
    """Run the bench, print its table and write the figures to `json_path`."""
    shuffler = random.Random(1)
    math, logic, instructions = _math(shuffler), _logic(shuffler), _instructions()
    kinds = ["math", "reasoning_gym", "instructions", "code"]
    with GraderPool(WORKERS, preload=kinds) as pool:
        figures: dict[str, Any] = {
            "cores": os.cpu_count(),
            "load_before": os.getloadavg()[0],
            "workers": WORKERS,
            "sandbox": working_backend().name,
            "math": _rates(pool, math, [_boxed(a) for a in HOSTILE_MATH]),
            "logic": _rates(pool, logic, [_tagged(a) for a in HOSTILE_LOGIC]),
            "instructions": _rates(pool, instructions, ["'" * 20_000, "[" * 20_000]),
        }
    figures["code"] = _code()
    figures["math_verify_directly"] = _math_verify(math)
    verl = _verl()
    if verl is not None:
        figures["verl_prime_code"] = verl
    figures["memory"] = _memory()
    _print(figures)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(figures, indent=1) + "\n")


def _rates(pool: GraderPool, items: list[Item], hostile: list[str]) -> dict[str, float]:
    pool.grade_many(items[:50])
    start = time.perf_counter()
    verdicts = pool.grade_many(items)
    clean = len(items) / (time.perf_counter() - start)
    mixed = [
        (record, hostile[i // 100 % len(hostile)] if i % 100 == 7 else text)
        for i, (record, text) in enumerate(items)
    ]
    killed, start = pool.killed, time.perf_counter()
    pool.grade_many(mixed)
    rate = len(mixed) / (time.perf_counter() - start)
    return {
        "responses": len(items),
        "mean_score": statistics.fmean(verdict.score for verdict in verdicts),
        "per_second": clean,
        "per_second_with_1_percent_hostile": rate,
        "killed": pool.killed - killed,
    }


def _rows(name: str) -> list[dict[str, Any]]:
    folder = Path(os.environ.get("PRORL_TEST_DATA", "../shared/data"))
    path = folder / name
    return [json.loads(line) for line in path.open()] if path.exists() else []


def _boxed(answer: str) -> str:
    return rf"so \boxed{{{answer}}}"


def _tagged(answer: str) -> str:
    return f"so <answer>{answer}</answer>"


def _math(shuffler: random.Random) -> list[Item]:
    """Long responses, half of them right; a wrong one answers another question."""
    golds = [str(row["answer"]) for row in _rows("math500.jsonl")]
    golds = golds or ["7", r"\frac{1}{2}", "(3, 4)", r"2\sqrt{3}", "x^2+1", r"\pi", "12", "5"] * 60
    padding = ("Let $x = \\frac{1}{2}$ and so on, one step after the other. " * 1200)[
        :RESPONSE_CHARACTERS
    ]
    items = []
    for gold in golds * 2:
        answer = gold if shuffler.random() < 0.5 else shuffler.choice(golds)
        items.append(({"kind": "math", "answer": gold}, padding + _boxed(answer)))
    return items


def _logic(shuffler: random.Random) -> list[Item]:
    import reasoning_gym

    items = []
    for task in LOGIC_TASKS:
        entries = list(reasoning_gym.create_dataset(task, size=50, seed=1))
        for entry in entries:
            other = shuffler.choice(entries)
            answer = entry["answer"] if shuffler.random() < 0.5 else other["answer"]
            record = {"kind": "reasoning_gym", "task": task, "entry": entry}
            items.append((record, "Thinking. " * 400 + _tagged(str(answer))))
    shuffler.shuffle(items)
    return items * 3


def _instructions() -> list[Item]:
    rows = (
        _rows("ifeval.jsonl")
        or [
            {
                "instruction_id_list": [
                    "punctuation:no_comma",
                    "length_constraints:number_sentences",
                ],
                "kwargs": [{}, {"num_sentences": 3, "relation": "at least"}],
            }
        ]
        * 300
    )
    response = "*One* sentence follows another, as in every text. It is not long.\n\n" * 40
    return [({"kind": "instructions", **row}, response) for row in rows]


def _code() -> dict[str, Any]:
    """Seconds of a trivial submission beyond what it runs, as a line over its tests."""
    from prorl_nemo.rewards.registry import grade

    source = "```python\nprint(int(input()) ** 2)\n```"
    cost = {}
    for count in (1, 10, 50):
        record = {
            "kind": "code",
            "tests": [{"input": f"{i}\n", "output": f"{i * i}"} for i in range(count)],
        }
        seconds = []
        for _ in range(15):
            start = time.perf_counter()
            assert grade(record, source).score == 1.0
            seconds.append(time.perf_counter() - start)
        cost[count] = statistics.median(seconds)
    per_test = (cost[50] - cost[1]) / 49
    with GraderPool(WORKERS, preload=["code"]) as pool:
        items: list[Item] = [(record, source)] * 40
        pool.grade_many(items[:4])
        start = time.perf_counter()
        pool.grade_many(items)
        rate = len(items) / (time.perf_counter() - start)
    return {
        "ms_per_submission": 1e3 * (cost[1] - per_test),
        "ms_per_test": 1e3 * per_test,
        "submissions_of_50_tests_per_second": rate,
    }


def _math_verify(items: list[Item]) -> dict[str, float]:
    """As its README shows it: parse the gold, parse the whole response, verify."""
    from math_verify import parse, verify

    sample = items[:100]
    start = time.perf_counter()
    for record, text in sample:
        verify(parse(f"${record['answer']}$"), parse(text))
    whole = len(sample) / (time.perf_counter() - start)
    start = time.perf_counter()
    for record, text in items[:300]:
        verify(parse(f"${record['answer']}$"), parse(text[text.rindex(r"\boxed") :]))
    box = 300 / (time.perf_counter() - start)
    return {"per_second_whole_response": whole, "per_second_last_box": box, "processes": 1}


def _verl() -> dict[str, float] | None:
    """verl's scorer for the same trivial submission; its package is loaded by itself."""
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0], "utils", "reward_score", "prime_code")
    alone = importlib.util.spec_from_file_location("prime_code", folder / "__init__.py")
    if alone is None or alone.loader is None:
        return None
    sys.modules["prime_code"] = module = importlib.util.module_from_spec(alone)
    alone.loader.exec_module(module)
    score: Callable[..., Any] = module.compute_score
    figures = {}
    for count in (1, 10, 50):
        tests = {
            "inputs": [f"{i}\n" for i in range(count)],
            "outputs": [f"{i * i}\n" for i in range(count)],
        }
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            assert score("```python\nprint(int(input()) ** 2)\n```", tests, continuous=True)[0]
            seconds.append(time.perf_counter() - start)
        figures[f"ms_with_{count}_tests"] = 1e3 * statistics.median(seconds)
    return figures


def _memory() -> dict[str, float]:
    """Memory of the pool's processes over many gradings, in MiB."""
    items: list[Item] = [
        ({"kind": "math", "answer": str(i % 97)}, _boxed(f"{i % 89} + {i}")) for i in range(1000)
    ]
    with GraderPool(WORKERS, preload=["math"]) as pool:
        pool.grade_many(items)
        here, template = psutil.Process(), psutil.Process(pool._template._process.pid)

        def used() -> float:
            processes = [here, template, *template.children()]
            return sum(p.memory_full_info().pss for p in processes) / 2**20

        sizes = [used()]
        start = time.perf_counter()
        for batch in range(MEMORY_GRADINGS // len(items)):
            pool.grade_many(items)
            if batch % 10 == 9:
                sizes.append(used())
        rate = MEMORY_GRADINGS / (time.perf_counter() - start)
    return {
        "gradings": MEMORY_GRADINGS,
        "mib_at_start": sizes[0],
        "mib_largest": max(sizes),
        "mib_at_end": sizes[-1],
        "per_second": rate,
    }


def _print(figures: dict[str, Any]) -> None:
    table = Table("what", "figure", title="Grading, per second unless said otherwise")
    for domain in ("math", "logic", "instructions"):
        rates = figures[domain]
        table.add_row(domain, f"{rates['per_second']:.0f}")
        hostile = rates["per_second_with_1_percent_hostile"]
        table.add_row(f"{domain}, 1 % hostile", f"{hostile:.0f} ({rates['killed']} killed)")
    for name in ("code", "math_verify_directly", "verl_prime_code", "memory"):
        for key, value in figures.get(name, {}).items():
            table.add_row(f"{name}: {key.replace('_', ' ')}", f"{value:.4g}")
    Console().print(table)
