"""The three records that walk through a training step: prompt, sample, group.

They are plain data, picklable and small, so that every room (data, rollout,
rewards, training) can speak of the same thing without importing another room.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One question, ready to be sampled.

    Attributes:
        prompt_id: unique over the whole data set and stable between runs
            (`<source>/<task>/<index>`); sampling seeds derive from it.
        domain: math, code, stem, logic or instructions.
        task: the data set or Reasoning Gym task inside the domain.
        messages: chat turns, `{"role": ..., "content": ...}`.
        token_ids: the rendered chat, generation prompt included.
        grading: what the domain's grader needs (gold answer, tests, ...); JSON-able.
    """

    prompt_id: str
    domain: str
    task: str
    messages: list[dict[str, str]]
    token_ids: list[int]
    grading: dict[str, Any]


@dataclass
class Sample:
    """One response of the engine, and its verdict once graded.

    Attributes:
        index: position in its group, 0 .. n-1.
        token_ids: response tokens, the end-of-turn token included when there is one.
        engine_logprobs: log-probability of each token under the *sampling*
            distribution (temperature applied), as the engine reports it.
        finish_reason: `stop`, or `length` when the response limit cut it; `interrupted` only
            while it waits to be continued (`rollout.surplus: carry_over`).
        text: the decoded response without special tokens.
        seed: the seed the engine sampled with.
        weight_version: of the policy that made its first token: the step after which the
            engine received it. Later tokens of a continued response may be of a later one.
        score: raw score in [0, 1] (None until graded).
        reason: one line on the verdict, for people.
    """

    index: int
    token_ids: list[int]
    engine_logprobs: list[float]
    finish_reason: str
    text: str
    seed: int
    weight_version: int
    score: float | None = None
    reason: str = ""

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass
class Group:
    """A prompt with its n graded responses, and the epoch it was drawn in."""

    prompt: Prompt
    epoch: int
    samples: list[Sample] = field(default_factory=list)

    @property
    def scores(self) -> list[float]:
        """Raw scores, in sample order. Raises if a sample was not graded."""
        scores = [s.score for s in self.samples]
        if any(s is None for s in scores):
            raise ValueError(f"group {self.prompt.prompt_id}: a sample has no score yet")
        return [float(s) for s in scores if s is not None]
