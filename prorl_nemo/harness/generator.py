"""What the runner asks of whoever answers: the training fleet, or somebody's server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class CannotAsk(Exception):
    """A prompt that this model cannot be given; the message is the reason, in a few words."""


@dataclass(frozen=True)
class Rendered:
    """A prompt as it is sent.

    Attributes:
        text: everything the model reads, system turn and template included, so that nothing is
            in a prompt that cannot be seen in the stored samples.
        token_ids: of it; None where a server renders the chat itself.
        messages: the chat turns.
        thinking: the prompt ends inside a thought that the response has to close.
    """

    text: str
    token_ids: list[int] | None
    messages: list[dict[str, str]]
    thinking: bool = False


@dataclass(frozen=True)
class Wanted:
    """One response wanted. `request_id` is unique while it is unanswered."""

    request_id: str
    prompt: Rendered
    seed: int


@dataclass(frozen=True)
class Answer:
    """A response.

    Attributes:
        token_ids: None where the server does not tell them.
        tokens: their number, end of turn included.
        truncated: the response limit cut it.
    """

    request_id: str
    text: str
    token_ids: list[int] | None
    tokens: int
    truncated: bool


class Generator(Protocol):
    """Answers requests in any order. `capacity`: requests that keep it busy."""

    capacity: int

    def render(self, messages: list[dict[str, str]]) -> Rendered:
        """Raises CannotAsk."""

    def start(self, longest_prompt: int) -> None:
        """Get ready for prompts of at most so many tokens."""

    def submit(self, wanted: Sequence[Wanted]) -> None: ...

    def poll(self, max_wait: float) -> list[Answer]:
        """Answers since the last call; waits up to `max_wait` seconds for one."""

    def settings(self) -> dict[str, Any]:
        """What of it the answers depend on."""

    def close(self) -> None: ...


def chat(system: str | None, prompt: str) -> list[dict[str, str]]:
    """The turns that ask one question. Without `system` the template's own default holds."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": prompt}]
