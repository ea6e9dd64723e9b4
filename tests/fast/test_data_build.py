"""`prorl data build`: bad rows, duplicates, evaluation sets, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builds import NUMBERS, deepscaler, problem, recipe, records, run, write_lines

from prorl_nemo.data.build import REPORT
from prorl_nemo.data.built_source import BuiltData
from prorl_nemo.data.contamination import EvaluationSets
from prorl_nemo.errors import RecipeError, UserError
from prorl_nemo.recipe import parse_recipe


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
