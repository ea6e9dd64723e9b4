"""`prorl grade`: a table by domain and reason, and every bad line named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from prorl_nemo.errors import UserError
from prorl_nemo.rewards.grade_file import grade_file

MATH = {"kind": "math", "answer": "7"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_tallies_and_output(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.jsonl",
        {"id": "a", "grading": MATH, "response": r"\boxed{7}"},
        {"id": "b", "grading": MATH, "response": r"\boxed{8}"},
        {"grading": MATH, "response": "7", "domain": "other"},
        "",
        "{not json",
        ["a list"],
        {"grading": {"kind": "nonsense"}, "response": ""},
        {"grading": MATH},
        {"id": "c", "grading": MATH, "response": r"\boxed{7.0}"},
    )
    report = grade_file(path, workers=1, out=tmp_path / "out.jsonl")
    found = {key: (t.count, t.score) for key, t in report.tallies.items()}
    assert found == {
        ("math", "correct"): (2, 2.0),
        ("math", "wrong"): (1, 0.0),
        ("other", "no answer"): (1, 0.0),
    }
    assert sorted(number for number, _ in report.bad_lines) == [5, 6, 7, 8]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(x["id"], x["line"], x["score"]) for x in lines] == [
        ("a", 1, 1.0), ("b", 2, 0.0), (3, 3, 0.0), ("c", 9, 1.0),
    ]  # fmt: skip
    console = Console(width=100, record=True, file=(tmp_path / "table").open("w"))
    console.print(report.table())
    text = console.export_text()
    assert "correct" in text
    assert "66.7%" in text


@pytest.mark.parametrize("content", ["", "nonsense", '{"grading": {}, "response": ""}'])
def test_a_file_without_a_gradable_line_is_an_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match="no line can be graded"):
        grade_file(write(tmp_path / "in.jsonl", content), workers=1)


def test_the_file_itself_is_not_written_over(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", {"grading": MATH, "response": "7"})
    (tmp_path / "link").symlink_to(path)
    for out in (path, tmp_path / "link"):
        with pytest.raises(UserError, match="another one"):
            grade_file(path, workers=1, out=out)
    assert "response" in path.read_text()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        grade_file(tmp_path / "nowhere.jsonl", workers=1)
