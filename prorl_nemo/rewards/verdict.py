"""What a grader says about one response."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prorl_nemo.errors import UserError


class GradingError(UserError):
    """The grading record of a prompt is malformed: the data, not the response, is at fault."""


@dataclass(frozen=True)
class Verdict:
    """Score of one response.

    Attributes:
        score: in [0, 1]; what the reward is made of.
        parts: figures behind the score (JSON-able), for logs and tables.
        reason: one line a person can read. Counted by `prorl grade`, so its part
            before the first colon is one of few phrases and details follow the colon.
    """

    score: float
    parts: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    def __post_init__(self) -> None:
        # Written so that NaN fails too: it would poison the advantages of the whole batch.
        if not 0.0 <= self.score <= 1.0:
            raise ValueError(f"score {self.score} is not in [0, 1]")


def zero(reason: str, **parts: Any) -> Verdict:
    """A verdict of 0 for `reason`."""
    return Verdict(0.0, parts, reason)
