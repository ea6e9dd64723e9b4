"""Gold responses of every kind score 1 with their own grader, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prorl_nemo.data import toy_domains
from prorl_nemo.data.public_sources import SOURCES
from prorl_nemo.data.row_files import rows
from prorl_nemo.rewards.gold import gold_response, known_item
from prorl_nemo.rewards.registry import KINDS, grade
from prorl_nemo.rewards.verdict import GradingError

RECORDS: list[dict[str, Any]] = [
    {"kind": "math", "answer": r"\frac{1}{2}"},
    {"kind": "math", "answer": ["7", "8"]},
    {"kind": "multiple_choice", "answer": "C"},
    {"kind": "code", "tests": [{"input": "3\n", "output": "9"}, {"input": "", "output": "'\\n"}]},
    {
        "kind": "code",
        "entry_point": "f",
        "tests": [{"input": [1, [2]], "output": {"a": [None, 1.5]}}, {"input": [], "output": "x"}],
    },
    {
        "kind": "reasoning_gym",
        "task": "chain_sum",
        "entry": {"question": "q", "answer": "12", "metadata": {}},
    },
]


@pytest.mark.parametrize("record", RECORDS, ids=json.dumps)
def test_golds_score_full_marks(record: dict[str, Any]) -> None:
    gold = gold_response(record)
    assert gold is not None
    assert grade(record, gold).score == 1.0
    assert grade(record, "").score == 0.0


def test_records_without_a_gold() -> None:
    checks = {"kind": "code", "entry_point": "f", "checks": ["assert f() == 1"]}
    instructions = {"kind": "instructions", "instruction_id_list": ["punctuation:no_comma"]}
    unsolved = {"kind": "reasoning_gym", "task": "rush_hour", "entry": {"answer": None}}
    cpp = {"kind": "code", "language": "cpp", "tests": [{"input": "1", "output": "1"}]}
    for record in (checks, instructions, unsolved, cpp):
        assert gold_response(record) is None
        known = known_item(record["kind"])
        assert known is not None and grade(*known).score == 1.0
    with pytest.raises(GradingError):
        gold_response({"kind": "math"})
    for kind in KINDS:
        known = known_item(kind)
        assert known is None or grade(known[0], "").score == 0.0


def test_the_toy_data_is_right(tmp_path: Path) -> None:
    """Each row is read by its public reader and gives a record whose gold scores 1."""
    toy_domains.write(tmp_path)
    for folder, source in (("deepscaler", "deepscaler"), ("eurus", "eurus_code")):
        (file,) = (tmp_path / folder).iterdir()
        read = [SOURCES[source].read(row) for _, row in rows(file) if isinstance(row, dict)]
        assert len(read) >= 80
        for reading in read[:: 1 if source == "deepscaler" else 15]:
            gold = gold_response(reading.grading)
            assert gold is not None and grade(reading.grading, gold).score == 1.0
    (file,) = (tmp_path / "nemotron").iterdir()
    for _, row in rows(file):
        assert isinstance(row, dict)
        record = SOURCES["nemotron_instructions"].read(row).grading
        assert 0.0 <= grade(record, "Some words.").score <= 1.0
