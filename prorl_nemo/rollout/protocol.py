"""What the sampler asks of an engine, a grader and a prompt stream, and the records between them.

One request is one sample, never `n` of them: each sample then has its own seed, finishes on its
own and can be aborted on its own. The engine's prefix cache computes a group's prompt once.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from prorl_nemo.records import Prompt


@dataclass(frozen=True)
class GenerationRequest:
    """One response wanted.

    Attributes:
        request_id: unique among the requests of an engine's life.
        prompt_token_ids: the rendered chat, generation prompt included.
        seed: of the sampler's random stream, 0 <= seed < 2**63.
        temperature: 0 is greedy.
        top_p: 1.0 in training, since the importance weight needs the whole distribution.
        max_tokens: response limit, the end-of-turn token and `prefix` included.
        prefix: the response's first tokens, made earlier: the engine goes on from there.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    seed: int
    temperature: float
    max_tokens: int
    top_p: float = 1.0
    prefix: Sequence[int] = ()


@dataclass(frozen=True)
class GenerationResult:
    """A response, without the prefix of its request.

    Attributes:
        token_ids: response tokens, the end-of-turn token included when there is one.
        logprobs: of each token under the sampling distribution (temperature and top-p applied).
        finish_reason: `stop`, `length`, `interrupted` (`GenerationEngine.interrupt`: more would
            have come), or `rejected` (the engine cannot serve this request: no tokens, the cause
            in `text`).
        text: the decoded response without special tokens, prefix included.
        weight_version: of the weights that made every one of these tokens.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str
    weight_version: int

    @property
    def rejected(self) -> bool:
        return self.finish_reason == "rejected"


class GenerationEngine(Protocol):
    """An engine or a fleet of them. Requests enter and leave at any time."""

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests; earlier ones are served first."""

    def poll(self, max_wait: float) -> list[GenerationResult]:
        """Responses finished since the last call; waits up to `max_wait` seconds for one."""

    def interrupt(self, request_ids: Sequence[str]) -> list[GenerationResult]:
        """Drop requests, and hand out what they have got so far: they never come out of `poll`.

        A request whose tokens are lost, because its engine died, is missing.
        """


class Grader(Protocol):
    """Grades responses while others are generated (`prorl_nemo.rewards`)."""

    def submit(self, request_id: str, grading: dict[str, Any], text: str) -> Future[Any]:
        """A future of a verdict with `score` in [0, 1] and `reason`."""


class PromptSource(Protocol):
    """An endless stream of prompts with a cursor (`prorl_nemo.data`)."""

    def draw(self) -> tuple[Prompt, int]:
        """The next prompt and the epoch it belongs to."""

    def put_back(self, prompts: list[tuple[Prompt, int]]) -> None:
        """Return prompts to the head of the queue, in this order."""
