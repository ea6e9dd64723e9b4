"""The one record that every data set is turned into, and the words that ask for an answer.

Our choice: a record holds the bare problem. The sentence that says how to answer belongs to the
domain and is added when a prompt is made, so that changing it needs no new build.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from prorl_nemo.data.chat import FORMAT_INSTRUCTION
from prorl_nemo.rewards.registry import grade
from prorl_nemo.rewards.verdict import GradingError

# ProRL's prompts (arXiv 2505.24864, appendix D): a box for mathematics and STEM, a code block for
# code, tags for logic, nothing for instructions.
INSTRUCTIONS: dict[str, str] = {
    "math": r"Let's think step by step and output the final answer within \boxed{}.",
    "stem": r"Let's think step by step and output the final answer within \boxed{}.",
    "code": "Write a Python solution and give it in a single block between ```python and ```.",
    "logic": FORMAT_INSTRUCTION,
    "instructions": "",
}
# The longest problems of contests have some 10,000 characters.
MAX_PROBLEM = 50_000

_WORD = re.compile(r"\w+")


class BadRowError(Exception):
    """A row that should be usable and is not; the message says why."""


class SkippedRow(Exception):
    """A row that is left out by rule; the message is the rule, short enough to count by."""


@dataclass(frozen=True)
class Record:
    """A problem and what grades its answers.

    Attributes:
        record_id: `<data set>/<row>`, unique over a build.
        domain: math, code, stem, logic or instructions.
        task: part of the domain: a data set, or a Reasoning Gym task.
        problem: the bare question.
        grading: the grader's record (docs/rewards.md); JSON-able.
    """

    record_id: str
    domain: str
    task: str
    problem: str
    grading: dict[str, Any]

    @property
    def question(self) -> str:
        """The problem with its domain's instruction."""
        instruction = INSTRUCTIONS[self.domain]
        return f"{self.problem}\n{instruction}" if instruction else self.problem

    @property
    def digest(self) -> str:
        """Equal for problems that differ in letter case and spacing only; 32 hex digits."""
        text = " ".join(self.problem.split()).casefold()
        return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()

    @property
    def gold_digest(self) -> str:
        """What is compared when two records ask the same question; 16 hex digits."""
        text = json.dumps(self.grading, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def words(text: str) -> list[str]:
    """Lower-case words and numbers: what is left of a text when its layout does not matter."""
    return _WORD.findall(text.casefold())


def check(record: Record) -> None:
    """Refuse a record that no response could be graded by. Raises BadRowError."""
    problem = record.problem
    if not problem.strip():
        raise BadRowError("the problem is empty")
    if len(problem) > MAX_PROBLEM:
        raise BadRowError(f"the problem has {len(problem)} characters, {MAX_PROBLEM} are allowed")
    if "\0" in problem or not _encodable(problem):
        raise BadRowError("the problem holds characters that are no text")
    if record.grading.get("kind") == "reasoning_gym":
        return  # Made by the library that scores it; loading 96 scorers would take minutes.
    try:
        # Graders read their record before they look at the response.
        grade(record.grading, "")
        json.dumps(record.grading)
    except GradingError as error:
        raise BadRowError(str(error)) from None
    except Exception as error:  # A row may hold anything, and must not end a build.
        raise BadRowError(f"its grader fails ({type(error).__name__}: {error})") from None


def _encodable(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
