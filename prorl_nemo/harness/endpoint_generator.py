"""An OpenAI-compatible server as generator, so that other people's servers are comparable.

The server renders the chat, so the stored prompt is the turns that were sent and not what its
template made of them; nor can its weights be pinned. Both are said in the result.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Sequence
from typing import Any

from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.benchmark import Sampling
from prorl_nemo.harness.generator import Answer, Rendered, Wanted

# A response of 32K tokens takes minutes; a server that is silent for longer has lost it.
_SECONDS = 3600.0
_RETRIES = 6
# Some servers keep a seed in 32 bits.
_SEED_BITS = 31
KEY_VARIABLE = "OPENAI_API_KEY"


class EndpointGenerator:
    """Chat completions of a server.

    Args:
        url: up to and including `/v1`.
        model: the name it is served under; None: the only one there is.
        concurrency: requests under way at once.

    Raises:
        UserError: the server cannot be reached, or serves no or several models.
    """

    def __init__(
        self, url: str, model: str | None, sampling: Sampling, concurrency: int = 32
    ) -> None:
        from openai import OpenAI

        self.url, self.capacity = url, concurrency
        self._sampling = sampling
        self._client = OpenAI(
            base_url=url,
            # Many servers want none; the client wants one to send.
            api_key=os.environ.get(KEY_VARIABLE) or "none",
            timeout=_SECONDS,
            max_retries=_RETRIES,
        )
        self.model = model or self._only_model()
        self._wanted: queue.SimpleQueue[Wanted | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer | UserError] = queue.SimpleQueue()
        self._failure: UserError | None = None
        self._closed = threading.Event()
        # Daemons: whoever stops an evaluation does not wait for the longest response.
        for _ in range(concurrency):
            threading.Thread(target=self._work, daemon=True).start()

    def render(self, messages: list[dict[str, str]]) -> Rendered:
        return Rendered(json.dumps(messages, ensure_ascii=False), None, messages)

    def start(self, longest_prompt: int) -> None:
        """The server runs already."""

    def submit(self, wanted: Sequence[Wanted]) -> None:
        for one in wanted:
            self._wanted.put(one)

    def poll(self, max_wait: float) -> list[Answer]:
        answers: list[Answer] = []
        try:
            self._take(answers, self._answers.get(timeout=max_wait))
            while True:
                self._take(answers, self._answers.get_nowait())
        except queue.Empty:
            pass
        # What was answered beside a failure is passed on first.
        if self._failure is not None and not answers:
            raise self._failure
        return answers

    def _take(self, answers: list[Answer], found: Answer | UserError) -> None:
        if isinstance(found, UserError):
            self._failure = self._failure or found
        else:
            answers.append(found)

    def settings(self) -> dict[str, Any]:
        return {"kind": "endpoint", "url": self.url, "served": self.model}

    def close(self) -> None:
        self._closed.set()
        for _ in range(self.capacity):
            self._wanted.put(None)
        self._client.close()

    def _only_model(self) -> str:
        from openai import OpenAIError

        try:
            listed = self._client.with_options(max_retries=1, timeout=60).models.list()
            names = [model.id for model in listed]
        except OpenAIError as error:
            raise UserError(f"{self.url}: cannot be reached ({_reason(error)})") from None
        if len(names) != 1:
            raise UserError(
                f"--served-model: {self.url} serves {len(names)} models "
                f"({', '.join(names[:5])}); name one"
            )
        return names[0]

    def _work(self) -> None:
        """Body of a thread: one request after the other."""
        while (wanted := self._wanted.get()) is not None and not self._closed.is_set():
            try:
                self._answers.put(self._ask(wanted))
            # Anything, or the runner would wait for this answer for ever.
            except Exception as error:
                self._answers.put(
                    UserError(
                        f"{self.url}: gives no answer ({_reason(error)}); what was answered is "
                        "kept: the same command goes on"
                    )
                )

    def _ask(self, wanted: Wanted) -> Answer:
        messages: Any = wanted.prompt.messages
        reply = self._client.chat.completions.create(
            model=self.model,
            messages=messages,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            max_tokens=self._sampling.max_tokens,
            seed=wanted.seed % (1 << _SEED_BITS),
        )
        choice = reply.choices[0]
        text = choice.message.content or ""
        # Servers that take the thought out of the text give it here, under either name.
        extra = choice.message.model_extra or {}
        thought = extra.get("reasoning_content") or extra.get("reasoning")
        if isinstance(thought, str) and thought:
            closed = "</think>" if text or choice.finish_reason == "stop" else ""
            text = f"<think>{thought}{closed}{text}"
        if reply.usage is None:
            raise ValueError("the server counts no tokens (usage)")
        return Answer(
            wanted.request_id,
            text,
            None,
            reply.usage.completion_tokens,
            choice.finish_reason == "length",
        )


def _reason(error: Exception) -> str:
    """One line. A server that repeats the key must not bring it into a log."""
    text = str(error).strip()
    key = os.environ.get(KEY_VARIABLE)
    return f"{type(error).__name__}: {(text.replace(key, '***') if key else text)[:300]}"
