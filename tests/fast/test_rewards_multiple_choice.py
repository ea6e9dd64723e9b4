"""Multiple choice: letters in every dress, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from prorl_nemo.rewards.registry import grade
from prorl_nemo.rewards.verdict import GradingError

RECORD = {
    "kind": "multiple_choice",
    "answer": "B",
    "choices": ["5 m", r"\frac{1}{2}", "the sun", "E = mc^2"],
}


@pytest.mark.parametrize(
    "box",
    ["B", "b", "(B)", r"\text{B}", r"\text{(B)}", "B.", "B)", "[B]", "B. one half", r"\mathrm{B}",
     "Option B", r"$\text{B}$", "0.5", r"\frac12", "1/2"],
)  # fmt: skip
def test_right_choices(box: str) -> None:
    assert grade(RECORD, rf"\boxed{{{box}}}").score == 1.0


@pytest.mark.parametrize("box", ["A", "C", "the sun", "A or B", "AB", "A, B", "5", "", "1", "ABCD"])
def test_wrong_choices(box: str) -> None:
    assert grade(RECORD, rf"\boxed{{{box}}}").score == 0.0


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("The answer is B", 0.0),
        (r"<think>\boxed{B}</think>", 0.0),
        (r"\boxed{A} then \boxed{B}", 1.0),
        (r"\boxed{B} then \boxed{A}", 0.0),
    ],
)
def test_only_the_last_box_counts(response: str, score: float) -> None:
    assert grade(RECORD, response).score == score


def test_a_single_letter_is_the_letter_of_a_choice() -> None:
    """Even among the choices D, C, B, A: the prompt asked for a letter."""
    record = {"kind": "multiple_choice", "answer": "A", "choices": ["D", "C", "B", "A"]}
    assert grade(record, r"\boxed{A}").score == 1.0
    assert grade(record, r"\boxed{D}").score == 0.0


def test_a_letter_beyond_the_choices_may_be_one_s_text() -> None:
    record = {"kind": "multiple_choice", "answer": "B", "choices": ["x", "y", "2x"]}
    assert [grade(record, rf"\boxed{{{box}}}").score for box in "yxzD"] == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "record",
    [
        {"answer": "7"},
        {"answer": None},
        {"answer": "BB"},
        {"answer": "E", "choices": ["a", "b"]},
        {"answer": "A", "choices": [1, 2]},
    ],
)
def test_malformed_records(record: dict[str, Any]) -> None:
    with pytest.raises(GradingError):
        grade({"kind": "multiple_choice", **record}, r"\boxed{A}")
