"""`prorl data build`: every public layout, bad rows, duplicates, evaluation sets, resuming."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from prorl_nemo.data.build import REPORT, build
from prorl_nemo.data.built_source import BuiltData, BuiltSource
from prorl_nemo.data.chat import ChatRenderer, load_tokenizer
from prorl_nemo.data.contamination import EvaluationSets
from prorl_nemo.data.parts import read_row
from prorl_nemo.data.prompts import load_prompts
from prorl_nemo.data.public_sources import SOURCES
from prorl_nemo.data.record import INSTRUCTIONS, BadRowError, Record, SkippedRow
from prorl_nemo.errors import RecipeError, UserError
from prorl_nemo.model_source import tiny_model
from prorl_nemo.recipe import Recipe, parse_recipe
from prorl_nemo.recipe_data import Domain
from prorl_nemo.rewards.registry import grade

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


# --- layouts --------------------------------------------------------------------------------


def test_deepscaler_as_a_json_list(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "deepscaler.json").write_text(json.dumps(deepscaler()))
    (folder / "README.md").write_text("not data")
    manifest = run(recipe(tmp_path / "out", [{"source": "deepscaler", "path": str(folder)}]))
    (source,) = manifest["sources"]
    # Of 40 a tenth is held out, not the 100 that the default asks for.
    assert (source["rows"], source["train"], source["held_out"]) == (40, 36, 4)
    assert source["licence"] == "MIT"
    found = records(tmp_path / "out") + records(tmp_path / "out", "held_out")
    assert sorted(r.problem for r in found) == sorted(problem(i) for i in range(40))
    for record in found:
        assert record.question.endswith(r"within \boxed{}.")
        gold = record.problem.split()[3]
        assert grade(record.grading, rf"\boxed{{{gold}}}").score == 1.0


@pytest.mark.parametrize("layout", ["verl", "label"])
def test_dapo_loses_its_own_instruction(tmp_path: Path, layout: str) -> None:
    asked = (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        "\n\nWhat is $2+2$?\n\nHence?\n\nRemember to put your answer on its own line after "
        '"Answer:".'
    )
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": asked}]}
    row |= {"reward_model": {"ground_truth": "4"}} if layout == "verl" else {"label": "4"}
    record = read_one(tmp_path, "dapo_math", "dapo-math-17k.jsonl", row)
    assert record.problem == "What is $2+2$?\n\nHence?"
    assert record.grading == {"kind": "math", "answer": "4"}


def test_eurus_programs_and_functions(tmp_path: Path) -> None:
    rows = [
        eurus(1, {"inputs": ["1 2\n", ["3 4", "5"]], "outputs": ["3\n", "12"]}),
        eurus(2, {"fn_name": "Solution.add", "inputs": [[1, 2]], "outputs": [[3]]}),
        eurus(3, {"fn_name": "pair", "inputs": [[1], [2]], "outputs": [[[1, 1]], [[2, 2]]]}),
        eurus(4, {"inputs": ["1"], "outputs": ["1"]}, ability="math"),
        eurus(5, {"inputs": ["1"], "outputs": ["1"]}, extra_info={"split": "test"}),
    ]
    data = tmp_path / "in" / "data"
    data.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), data / "train-00000-of-00001.parquet")
    write_lines(data / "validation.jsonl", ["not", "to be", "read"])
    manifest = run(recipe(tmp_path / "out", [{"source": "eurus_code", "path": str(data.parent)}]))
    (source,) = manifest["sources"]
    assert source["left out: not code"] == source["left out: not of the training split"] == 1
    found = {r.problem: r.grading for r in records(tmp_path / "out")}
    tests = [{"input": "1 2\n", "output": "3\n"}, {"input": "3 4\n5", "output": "12"}]
    assert found["Task 1: add the numbers."] == {"kind": "code", "tests": tests}
    assert found["Task 2: add the numbers."] == {
        "kind": "code",
        "entry_point": "add",
        "tests": [{"input": [1, 2], "output": 3}],
    }
    assert found["Task 3: add the numbers."]["tests"][1] == {"input": [2], "output": [2, 2]}
    assert manifest["tasks"] == {"code": {"eurus_taco": {"train": 3}}}


def test_scp_keeps_what_two_solutions_agree_on(tmp_path: Path) -> None:
    def row(index: int, solution: str, response: str) -> dict[str, Any]:
        return {
            "domain": "physics",
            "problem": problem(index),
            "extract_solution": solution,
            "r1_response": response,
        }

    rows = [
        row(1, r"so \boxed{\frac{1}{2}}", r"<think>\boxed{3}</think> It is \boxed{0.5}."),
        row(2, "7 m", r"\boxed{8\text{ m}}"),
        row(3, "12", r"\boxed{12}"),
        row(4, "a long derivation " * 20, r"\boxed{1}"),
        row(5, "5", "I do not know."),
        row(6, "a long derivation " * 20, r"\boxed{6}") | {"is_r1_consistent": True},
        row(7, "7", r"\boxed{7}") | {"is_r1_consistent": "False"},
    ]
    write_lines(tmp_path / "in" / "SCP_116K_in_open_source_format.jsonl", rows)
    sources = [{"source": "scp", "path": str(tmp_path / "in")}]
    manifest = run(recipe(tmp_path / "out", sources))
    (source,) = manifest["sources"]
    assert source["left out: no agreement"] == 1
    assert source["left out: no short answer to compare"] == 2
    assert source["left out: judged not to agree"] == 1
    golds = {r.problem: r.grading["answer"] for r in records(tmp_path / "out")}
    assert golds == {problem(1): [r"\frac{1}{2}", "0.5"], problem(3): ["12"], problem(6): "6"}


@pytest.mark.parametrize("encoded", [True, False])
def test_nemotron_instructions(tmp_path: Path, encoded: bool) -> None:
    arguments: dict[str, Any] = {
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "instruction_kwargs": [None, {"num_words": 3, "relation": "at least", "x": None}],
    }
    row = {
        "input": [{"role": "user", "content": "Write. No commas."}],
        "args": json.dumps(arguments) if encoded else arguments,
        "category": "instruction following",
    }
    name = "RL/instruction_following/instruction_following.jsonl"
    record = read_one(tmp_path, "nemotron_instructions", name, row)
    assert record.question == "Write. No commas."
    assert grade(record.grading, "one two three").score == 1.0
    assert grade(record.grading, "one, two").score == 0.0


def own(number: int, domain: str = "math", **changes: Any) -> dict[str, Any]:
    grading = {"kind": "math", "answer": str(number)}
    return {"domain": domain, "task": "goats", "problem": problem(number), "grading": grading} | (
        changes
    )


def test_every_domain_has_its_words() -> None:
    assert set(INSTRUCTIONS) == set(get_args(Domain))


def test_records_of_ones_own(tmp_path: Path) -> None:
    """Several domains in one file; the domain's sentence is added, gradings stay as they are."""
    rows = [own(i) for i in range(20)] + [own(i, "logic", task="other") for i in range(20, 40)]
    rows += [own(50, grading=json.dumps(own(50)["grading"]))]
    write_lines(tmp_path / "goats.jsonl", rows)
    sources = [{"source": "records", "path": str(tmp_path / "goats.jsonl")}]
    manifest = run(recipe(tmp_path / "out", sources))
    assert manifest["tasks"] == {
        "logic": {"other": {"held_out": 2, "train": 18}},
        "math": {"goats": {"held_out": 2, "train": 19}},
    }
    found = {
        r.problem: r for r in records(tmp_path / "out") + records(tmp_path / "out", "held_out")
    }
    assert len(found) == 41
    assert found[problem(50)].grading == {"kind": "math", "answer": "50"}
    assert found[problem(3)].question.endswith(r"within \boxed{}.")
    assert found[problem(30)].question.endswith("</answer>.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (own(1, "arithmetic"), "domain 'arithmetic' is none of math"),
        (own(1, task="two words"), "task 'two words': use letters"),
        (own(1, grading="right"), "grading is not JSON"),
        (own(1, grading=["right"]), "grading is no object"),
        (own(1, grading={"kind": "guess"}), "grading.kind: 'guess' is unknown"),
        ({"problem": "What?"}, "no field domain"),
    ],
)
def test_records_that_cannot_be_used(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRowError, match=message):
        read_row(SOURCES["records"], row, "x/1")


# --- what is wrong --------------------------------------------------------------------------


def bad_rows() -> list[Any]:
    return [
        "{not json",
        "[1, 2]",
        '{"problem": "\\ud800 no text", "answer": "1"}',
        {"problem": "No answer?", "answer": None},
        {"problem": "Empty answer?", "answer": "  "},
        {"problem": "", "answer": "1"},
        {"problem": 7, "answer": "1"},
        {"problem": "Long answer?", "answer": "1" * 1000},
        {"problem": "x" * 60_000, "answer": "1"},
        {"problem": "nul \0", "answer": "1"},
        {"answer": "1"},
        "[" * 100_000,
    ]


def test_bad_rows_are_reported_with_their_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "deepscaler.jsonl", deepscaler() + bad_rows())
    sources = [{"source": "deepscaler", "path": str(tmp_path / "in" / "deepscaler.jsonl")}]
    manifest = run(recipe(tmp_path / "out", sources, max_bad_share=0.5))
    assert manifest["sources"][0]["bad_rows"] == len(bad_rows())
    report = [json.loads(line) for line in (tmp_path / "out" / REPORT).open()]
    assert [row["line"] for row in report] == list(range(41, 41 + len(bad_rows())))
    assert "not JSON" in report[0]["reason"] and "no field answer" in report[3]["reason"]


def test_too_many_bad_rows_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "deepscaler.jsonl", deepscaler(99) + bad_rows()[:2])
    sources = [{"source": "deepscaler", "path": str(tmp_path / "in" / "deepscaler.jsonl")}]
    with pytest.raises(RecipeError, match=r"2 of 101 rows .*max_bad_share \(0.01\)[^$]*row 100: "):
        run(recipe(tmp_path / "out", sources))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(recipe(tmp_path / "out", sources, max_bad_share=0.02))["shards"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"source": "deepscaler", "path": "/nowhere"}, "no such file or folder"),
        ({"source": "deepscaler", "path": "."}, "holds no data file like deepscaler.json"),
        ({"source": "deepscaler", "path": "broken.parquet"}, "cannot be read"),
        ({"source": "deepscaler", "path": "empty.jsonl"}, "has no rows"),
    ],
)
def test_a_source_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    if source["path"] == ".":
        (tmp_path / "broken.parquet").unlink()
        (tmp_path / "empty.jsonl").rename(tmp_path / "other.csv")
    with pytest.raises(UserError, match=message):
        run(recipe(tmp_path / "out", [source]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"source": "deepscaler", "tasks": {"chain_sum": {}}}, "tasks: not for deepscaler"),
        ({"source": "reasoning_gym"}, "reasoning_gym never ends"),
        ({"source": "reasoning_gym", "limit": 5, "path": "x"}, "path: not for reasoning_gym"),
        ({"source": "deepscalar"}, "deepscaler"),
        ({"source": "records"}, "path: records are files of your own"),
        ({"source": "records", "path": "x", "revision": "1"}, "revision: not for records"),
    ],
)
def test_wrong_build_settings(tmp_path: Path, source: dict[str, Any], message: str) -> None:
    raw = {
        "name": "x",
        "model": "m",
        "stages": [{"steps": 1}],
        "data": {
            "build": {"folder": str(tmp_path), "sources": [source]},
            "sources": [{"kind": "built", "domain": "math"}],
        },
    }
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "built"}, "needs one"),
        ({"kind": "built", "domain": "math", "size": 4}, "size: not for kind built"),
        ({"kind": "reasoning_gym", "task": "lcm", "domain": "logic"}, "domain: not for kind"),
        ({"kind": "built", "domain": "math"}, "needs folder, or data.build"),
        ({"domain": "math"}, "task: an entry of kind reasoning_gym needs one"),
    ],
)
def test_wrong_entries_of_the_mixture(entry: dict[str, Any], message: str) -> None:
    raw = {"name": "x", "model": "m", "stages": [{"steps": 1}], "data": {"sources": [entry]}}
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw)


KEYS = {
    "deepscaler": ["problem", "answer"],
    "dapo_math": ["prompt", "label", "reward_model"],
    "eurus_code": ["ability", "prompt", "reward_model", "extra_info", "data_source"],
    "scp": ["problem", "r1_response", "extract_solution", "is_r1_consistent"],
    "nemotron_instructions": ["input", "args", "instruction_id_list", "kwargs"],
    "records": ["domain", "task", "problem", "grading"],
}
SPOKEN = (
    r"code \boxed{1} </think> user role content inputs outputs fn_name ground_truth true { [[1]]"
)
WORDS = st.sampled_from([*SPOKEN.split(), "punctuation:no_comma", "instruction_kwargs", "\ud800"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("name", KEYS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_a_row_holds(name: str, data: st.DataObject) -> None:
    row = {key: data.draw(JSON) for key in KEYS[name]}
    if name == "eurus_code":
        row["ability"] = "code"
        tests = data.draw(st.dictionaries(st.sampled_from(["inputs", "outputs", "fn_name"]), JSON))
        row["reward_model"] = {"ground_truth": json.dumps(tests)}
    with contextlib.suppress(BadRowError, SkippedRow):
        record, _ = read_row(SOURCES[name], row, "x/1")
        assert 0.0 <= grade(record.grading, "").score <= 1.0


# --- duplicates and evaluation sets ---------------------------------------------------------


def test_duplicates_within_and_across_sources(tmp_path: Path) -> None:
    again = {"problem": problem(3).upper().replace(" ", "\n"), "answer": "3"}
    write_lines(tmp_path / "a" / "deepscaler.jsonl", [*deepscaler(20), again])
    other = [{"prompt": problem(i), "answer": str(i + (i == 5))} for i in range(4, 30)]
    write_lines(tmp_path / "b" / "dapo-math-17k.jsonl", other)
    sources = [
        {"source": "deepscaler", "path": str(tmp_path / "a")},
        {"source": "dapo_math", "path": str(tmp_path / "b")},
    ]
    manifest = run(recipe(tmp_path / "out", sources, held_out=0))
    first, second = manifest["sources"]
    assert (first["duplicates"], first["train"]) == (1, 20)
    assert (second["duplicates"], second["train"]) == (16, 10)
    assert second["duplicates_with_another_answer"] == 1
    assert sorted(r.problem for r in records(tmp_path / "out")) == sorted(map(problem, range(30)))


def test_evaluation_questions_are_removed_and_listed(tmp_path: Path) -> None:
    exam = "Let $ABC$ be a triangle with sides 13, 14 and 15. Find the radius of its incircle."
    changed = exam.replace("Find the radius", "Determine the radius")
    inside = f"Here is a nice one for you, taken from a contest of last year. {exam} Good luck!"
    alike = "Let $ABC$ be a triangle with angles 30, 60 and 90. Find the length of its altitude."
    rows = [{"problem": p, "answer": "4"} for p in (exam, changed, inside, alike, "What is 2+2?")]
    write_lines(tmp_path / "in" / "deepscaler.jsonl", rows + deepscaler())
    write_lines(tmp_path / "exams" / "one.jsonl", [{"problem": exam}, {"question": "what IS 2 2"}])
    (tmp_path / "exams" / "two.json").write_text(
        json.dumps([{"prompt": [{"role": "user", "content": "An entirely different question."}]}])
    )
    sources = [{"source": "deepscaler", "path": str(tmp_path / "in")}]
    settings = {"evaluation": [str(tmp_path / "exams")], "held_out": 0}
    manifest = run(recipe(tmp_path / "out", sources, **settings))
    assert manifest["evaluation_questions"] == {"one.jsonl": 2, "two.json": 1}
    assert manifest["sources"][0]["contaminated"] == 4
    report = [json.loads(line) for line in (tmp_path / "out" / REPORT).open()]
    assert [row["reason"] for row in report] == ["asked by one.jsonl:1"] * 3 + [
        "asked by one.jsonl:2"
    ]
    assert [row["share"] == 1.0 for row in report] == [True, False, True, True]
    left = {r.problem for r in records(tmp_path / "out")}
    assert alike in left and len(left) == 41


def test_the_overlap_by_hand(tmp_path: Path) -> None:
    """10 words make 8 runs of 3. A changed 4th word breaks 3 of them."""
    path = write_lines(tmp_path / "exam.jsonl", [{"text": " ".join(NUMBERS)}])
    changed = " ".join(NUMBERS).replace("four", "FORTY")
    for overlap, found in ((5 / 8, True), (5 / 8 + 0.01, False)):
        match = EvaluationSets([str(path)], ngram=3, overlap=overlap).match(changed)
        assert (match is not None) == found
    match = EvaluationSets([str(path)], 3, 0.5).match(changed)
    assert match is not None and match.share == 5 / 8 and match.question == "exam.jsonl:1"


def test_an_evaluation_set_without_questions_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "exam.jsonl", [{"problem": "ok"}, {"answer": "1"}])
    with pytest.raises(RecipeError, match=r"evaluation\.0: .*exam.jsonl, row 2: no question"):
        EvaluationSets([str(path)], 8, 0.5)


# --- what is written ------------------------------------------------------------------------


def test_the_same_build_whatever_the_order(tmp_path: Path) -> None:
    for name, rows in (("a", deepscaler(80)), ("b", deepscaler(80)[::-1])):
        path = write_lines(tmp_path / name / "deepscaler.jsonl", rows)
        sources = [{"source": "deepscaler", "path": str(path), "limit": 30}]
        manifest = run(recipe(tmp_path / f"out_{name}", sources, held_out=5))
        assert manifest["sources"][0]["beyond_limit"] == 80 - 5 - 30
    for split in ("train", "held_out"):
        a, b = (sorted(r.problem for r in records(tmp_path / f"out_{n}", split)) for n in "ab")
        assert a == b and len(a) == (30 if split == "train" else 5)


def test_a_build_goes_on_and_replaces(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in" / "deepscaler.jsonl", deepscaler())
    settings = recipe(tmp_path / "out", [{"source": "deepscaler", "path": str(path)}])
    first = run(settings)
    (part,) = (tmp_path / "out" / ".parts").glob("*.parquet")
    made = part.stat().st_mtime_ns
    assert run(settings) == first
    assert part.stat().st_mtime_ns == made
    write_lines(path, deepscaler(41))
    second = run(settings)
    shards = {shard["file"] for shard in second["shards"]}
    assert shards == {f.name for f in (tmp_path / "out").glob("*.parquet")}
    assert shards != {shard["file"] for shard in first["shards"]}


# --- prompts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> ChatRenderer:
    folder = tiny_model("llama", tmp_path_factory.mktemp("model") / "m", layers=1)
    return ChatRenderer(load_tokenizer(folder), 1000)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("built")
    write_lines(folder / "math" / "deepscaler.jsonl", deepscaler(60))
    code = [eurus(i, {"inputs": [str(i)], "outputs": [str(i)]}) for i in range(30)]
    code += [eurus(100 + i, {"inputs": ["1"], "outputs": ["1"]}, data_source="apps")
             for i in range(30)]  # fmt: skip
    write_lines(folder / "code" / "train.jsonl", code)
    sources = [
        {"source": "deepscaler", "path": str(folder / "math")},
        {"source": "eurus_code", "path": str(folder / "code")},
    ]
    settings = recipe(folder / "out", sources, held_out=3)
    run(settings)
    return settings


def test_prompts_of_a_build(built: Recipe, renderer: ChatRenderer) -> None:
    tokenizer = renderer._tokenizer
    stream, validation, _ = load_prompts(built, tokenizer)
    drawn = [stream.draw() for _ in range(114)]
    assert stream.drawn == {"math": 57, "code": 57}
    problems = [p.messages[-1]["content"] for p, _ in drawn]
    assert {epoch for _, epoch in drawn[:108]} == {0}
    assert len(set(problems[:108])) == 108  # No prompt twice in an epoch.
    exam = [p.messages[-1]["content"] for p in validation]
    assert not set(exam) & set(problems)
    assert [p.task for p in validation] == ["deepscaler"] * 2 + ["eurus_apps"] * 2 + [
        "eurus_taco"
    ] * 2
    prompt = drawn[0][0]
    assert prompt.token_ids == renderer.render(prompt.messages)
    # Resumed in the middle, with prompts put back.
    other = load_prompts(built, tokenizer).stream
    for _ in range(50):
        other.draw()
    other.put_back(drawn[45:50])
    resumed = load_prompts(built, tokenizer).stream
    resumed.load_state_dict(json.loads(json.dumps(other.state_dict())))
    assert [resumed.draw() for _ in range(40)] == drawn[45:85]


def test_another_seed_is_another_order(built: Recipe, renderer: ChatRenderer) -> None:
    orders = []
    for seed in (1, 2):
        stream = load_prompts(built.model_copy(update={"seed": seed}), renderer._tokenizer).stream
        orders.append([stream.draw()[0].messages[-1]["content"] for _ in range(20)])
    assert orders[0] != orders[1]


def test_a_task_of_its_own_leaves_its_domain(built: Recipe, renderer: ChatRenderer) -> None:
    raw = built.model_dump(mode="json", exclude_unset=True)
    raw["data"]["sources"] = [
        {"kind": "built", "domain": "code"},
        {"kind": "built", "domain": "code", "task": "eurus_apps", "weight": 3},
    ]
    stream = load_prompts(parse_recipe(raw), renderer._tokenizer).stream
    tasks = [stream.draw()[0].task for _ in range(40)]
    assert tasks.count("eurus_apps") == 30 and tasks.count("eurus_taco") == 10
    raw["data"]["sources"][1]["task"] = "eurus_aps"
    with pytest.raises(RecipeError, match=r"sources\.1\.task: .* it has eurus_apps, eurus_taco"):
        load_prompts(parse_recipe(raw), renderer._tokenizer)
    raw["data"]["sources"] = [{"kind": "built", "domain": "stem"}]
    with pytest.raises(RecipeError, match="no stem is left"):
        load_prompts(parse_recipe(raw), renderer._tokenizer)


def test_more_held_out_prompts_than_were_set_aside(built: Recipe, renderer: ChatRenderer) -> None:
    data = BuiltData(Path(built.data.build.folder), "key") if built.data.build else None
    assert data is not None
    source = BuiltSource(data, "math", "math", {"deepscaler"}, seed=1, renderer=renderer)
    assert len(source.held_out(3)) == 3
    with pytest.raises(RecipeError, match="math has 3 held-out prompts"):
        source.held_out(4)


def test_changed_shards_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in" / "deepscaler.jsonl", deepscaler())
    settings = recipe(tmp_path / "out", [{"source": "deepscaler", "path": str(path)}])
    with pytest.raises(UserError, match="holds no built data; run prorl data build"):
        BuiltData(tmp_path / "out", "data.build.folder")
    manifest = run(settings)
    shard = tmp_path / "out" / manifest["shards"][0]["file"]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="has changed since it was built"):
        BuiltData(tmp_path / "out", "data.build.folder")
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json cannot be read"):
        BuiltData(tmp_path / "out", "data.build.folder")
