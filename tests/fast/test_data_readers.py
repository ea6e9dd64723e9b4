"""Every public layout, whatever its rows hold, becomes the record that its grader reads."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builds import deepscaler, eurus, own, problem, read_one, recipe, records, run, write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prorl_nemo.data.parts import read_row
from prorl_nemo.data.public_sources import SOURCES
from prorl_nemo.data.record import INSTRUCTIONS, BadRowError, SkippedRow
from prorl_nemo.recipe_data import Domain
from prorl_nemo.rewards.registry import grade


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
