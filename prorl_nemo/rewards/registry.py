"""Which grader a grading record asks for, by its key `kind`.

Modules are imported when their kind is first seen: a worker that grades logic never
loads the instruction checkers.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from prorl_nemo.rewards.verdict import GradingError, Verdict


@dataclass(frozen=True)
class Kind:
    """A grader.

    Attributes:
        module: has `grade(grading, text, training) -> Verdict`, and may have
            `extra_seconds(grading)`: what it may take beyond the pool's limits.
        confined: graded in a worker that can neither write files nor start processes nor
            reach the network. False only for code, which runs its own sandbox.
    """

    module: str
    confined: bool = True

    def load(self) -> ModuleType:
        """Import the grader, once in a process."""
        return importlib.import_module(self.module)


KINDS: dict[str, Kind] = {
    "reasoning_gym": Kind("prorl_nemo.rewards.logic"),
    "math": Kind("prorl_nemo.rewards.math"),
    "multiple_choice": Kind("prorl_nemo.rewards.multiple_choice"),
    "instructions": Kind("prorl_nemo.rewards.instructions"),
    "code": Kind("prorl_nemo.rewards.code", confined=False),
}


def kind_of(grading: dict[str, Any]) -> Kind:
    """The grader of a record. Raises GradingError for an unknown or missing kind."""
    name = grading.get("kind") if isinstance(grading, dict) else None
    if not isinstance(name, str) or name not in KINDS:
        raise GradingError(f"grading.kind: {name!r} is unknown; known: {', '.join(sorted(KINDS))}")
    return KINDS[name]


def grade(grading: dict[str, Any], response_text: str, *, training: bool = True) -> Verdict:
    """Grade one response in this process.

    Args:
        grading: the prompt's grading record; its other keys are the grader's (docs/rewards.md).
        response_text: the response, decoded without special tokens.
        training: continuous scores where ProRL trains with them; False gives the
            protocol of evaluation (code: all tests or nothing).

    Raises:
        GradingError: the record is malformed. Whatever the response is, nothing is raised.
    """
    verdict: Verdict = kind_of(grading).load().grade(grading, response_text, training)
    return verdict
