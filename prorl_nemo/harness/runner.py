"""The loop between generator and graders: every sample once, each written down when it is there.

Requests of all benchmarks are one queue, so that no engine waits for the last long response of a
benchmark before it begins the next. A sample's seed derives from (seed, item, index): neither the
order of items nor the number of engines nor a kill changes which samples there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.estimators import NOT_ASKED, kind_of
from prorl_nemo.evaluation.items import Item
from prorl_nemo.evaluation.suite import Suite
from prorl_nemo.harness.generator import Answer, CannotAsk, Generator, Rendered, Wanted, chat
from prorl_nemo.harness.store import Store
from prorl_nemo.harness.view import EvaluationView
from prorl_nemo.rewards.extraction import final_part, last_tag
from prorl_nemo.rewards.pool import GraderPool
from prorl_nemo.rewards.sandbox.probe import working_backend
from prorl_nemo.rewards.verdict import GradingError, Verdict
from prorl_nemo.rollout.seeds import sample_seed

_POLL_SECONDS = 0.25
# Generous: how busy a machine is must not decide about an answer.
_SOFT_SECONDS, _HARD_SECONDS = 10.0, 20.0
# Responses that may wait for a grader before no new ones are asked for: they are in memory.
_MOST_UNGRADED = 4096


@dataclass(frozen=True)
class Question:
    """An item as this model is asked it; `prompt` is the reason where it cannot be."""

    benchmark: str
    item: Item
    samples: int
    prompt: Rendered | str

    @property
    def grading(self) -> dict[str, Any]:
        """The grader's record, with what it must know of the prompt."""
        inside = isinstance(self.prompt, Rendered) and self.prompt.thinking
        return {**self.item.grading, "thinking": True} if inside else self.item.grading


@dataclass
class Times:
    """Where the time went, in seconds.

    Attributes:
        busy: generating or grading.
        own: of it, this process's work beside them: asking, writing, counting.
        tokens, samples: that were generated.
        stages: what came before and after, by name.
    """

    busy: float = 0.0
    own: float = 0.0
    tokens: int = 0
    samples: int = 0
    stages: dict[str, float] = field(default_factory=dict)


def open_graders(suite: Suite, workers: int | None, sandbox: str) -> GraderPool:
    """The graders that a suite needs. Raises UserError where its code could not be isolated."""
    kinds = sorted({item.grading["kind"] for part in suite.parts for item in part.items.items})
    if "code" in kinds:
        working_backend(sandbox)
    return GraderPool(
        # Graders work while the engines do, so they get half of the cores.
        workers or max(1, (os.cpu_count() or 2) // 2),
        soft_limit_s=_SOFT_SECONDS,
        hard_limit_s=_HARD_SECONDS,
        preload=kinds,
        sandbox=sandbox,
    )


def render(suite: Suite, generator: Generator) -> dict[str, Question]:
    """Every item as the model is asked it, by id."""
    questions = {}
    for part in suite.parts:
        for item in part.items.items:
            prompt: Rendered | str
            try:
                prompt = generator.render(chat(part.benchmark.system, item.prompt))
            except CannotAsk as why:
                prompt = str(why)
            question = Question(part.benchmark.name, item, part.samples, prompt)
            questions[item.item_id] = question
    return questions


def prompts_sha256(questions: Mapping[str, Question]) -> str:
    """Of every prompt as the model reads it. A template may change by itself: some write the date
    into the system turn, and another release of a library may render otherwise."""
    found = hashlib.sha256()
    for item_id in sorted(questions):
        prompt = questions[item_id].prompt
        text = prompt.text if isinstance(prompt, Rendered) else prompt
        found.update(json.dumps([item_id, text]).encode())
    return found.hexdigest()


def longest(questions: Mapping[str, Question]) -> int:
    """Tokens of the longest prompt; 0 where a server counts them."""
    prompts = [q.prompt for q in questions.values() if isinstance(q.prompt, Rendered)]
    return max((len(p.token_ids) for p in prompts if p.token_ids is not None), default=0)


def answer_all(
    questions: Mapping[str, Question],
    seed: int,
    generator: Generator,
    graders: GraderPool,
    store: Store,
    view: EvaluationView,
    stop: threading.Event,
) -> Times:
    """Generate and grade what the store lacks; returns early once `stop` is set.

    Raises:
        UserError: engine, server, grader or disk cannot go on. What there was is kept.
    """
    loop = _Loop(questions, seed, generator, graders, store, view)
    while not stop.is_set() and loop.turn():
        pass
    return loop.times


class _Loop:
    """What is under way: requests at the generator, responses at the graders."""

    def __init__(
        self,
        questions: Mapping[str, Question],
        seed: int,
        generator: Generator,
        graders: GraderPool,
        store: Store,
        view: EvaluationView,
    ) -> None:
        self.times = Times()
        self._questions, self._generator, self._graders = questions, generator, graders
        self._store, self._view = store, view
        self._under_way: dict[str, dict[str, Any]] = {}
        self._grading: deque[tuple[dict[str, Any], Future[Verdict]]] = deque()
        known = {(row["item"], row["sample"]) for row in store.ungraded}
        self._wanted = _wanted(questions, seed, store, known)
        for row in store.ungraded:
            self._grade(row)

    def turn(self) -> bool:
        """Ask, wait a moment, write down what came. False once nothing is left to do."""
        began = time.perf_counter()
        self._ask()
        if not self._under_way and not self._grading:
            return False
        asked = time.perf_counter()
        answers = self._wait()
        answered = time.perf_counter()
        for answer in answers:
            row = _answered(self._under_way.pop(answer.request_id), answer)
            self._store.generated(row)
            self.times.tokens += answer.tokens
            self.times.samples += 1
            self._grade(row)
        self._collect()
        self._view.progress(self.times.tokens, len(self._under_way), len(self._grading))
        ended = time.perf_counter()
        self.times.busy += ended - began
        self.times.own += (asked - began) + (ended - answered)
        return True

    def _ask(self) -> None:
        """Keep the generator busy, unless the graders are far behind."""
        batch = []
        while len(self._under_way) < self._generator.capacity:
            following = next(self._wanted, None) if len(self._grading) < _MOST_UNGRADED else None
            if following is None:
                break
            row, request = following
            if request is None:
                self._keep(row)
                continue
            self._under_way[request.request_id] = row
            batch.append(request)
        if batch:
            self._generator.submit(batch)

    def _wait(self) -> list[Answer]:
        if self._under_way:
            due = self._grading and self._grading[0][1].done()
            return self._generator.poll(0.0 if due else _POLL_SECONDS)
        # Only graders are at work. What the future raises is raised where its row is written.
        self._grading[0][1].exception()
        return []

    def _grade(self, row: dict[str, Any]) -> None:
        request_id = f"{row['item']}#{row['sample']}"
        record = self._questions[row["item"]].grading
        future = self._graders.submit(request_id, record, row["response"], training=False)
        self._grading.append((row, future))

    def _collect(self) -> None:
        """Verdicts in whatever order they are done: a slow one does not hold up the others."""
        for _ in range(len(self._grading)):
            row, future = self._grading.popleft()
            if future.done():
                self._keep(verdict_of(row, self._questions[row["item"]].grading, future))
            else:
                self._grading.append((row, future))

    def _keep(self, row: dict[str, Any]) -> None:
        self._store.graded(row)
        self._view.sample(row)


def _wanted(
    questions: Mapping[str, Question], seed: int, store: Store, known: set[tuple[str, int]]
) -> Iterator[tuple[dict[str, Any], Wanted | None]]:
    """Rows to be filled, each with the request that fills it; None where there is none to make."""
    for item_id, question in questions.items():
        for index in range(question.samples):
            key = (item_id, index)
            if key in store or key in known:
                continue
            own_seed = sample_seed(seed, item_id, 0, index)
            row: dict[str, Any] = {
                "benchmark": question.benchmark,
                "item": item_id,
                "sample": index,
                "seed": own_seed,
            }
            if isinstance(question.prompt, str):
                reason = f"{NOT_ASKED}: {question.prompt}"
                empty = Answer("", "", [], 0, False)
                row = _answered({**row, "prompt": question.item.prompt}, empty)
                yield with_verdict(row, question.grading, Verdict(0.0, {}, reason)), None
                continue
            row["prompt"] = question.prompt.text
            yield row, Wanted(f"{item_id}#{index}", question.prompt, own_seed)


def _answered(row: dict[str, Any], answer: Answer) -> dict[str, Any]:
    return {
        **row,
        "response": answer.text,
        "token_ids": answer.token_ids,
        "tokens": answer.tokens,
        "truncated": answer.truncated,
    }


def verdict_of(
    row: dict[str, Any], grading: dict[str, Any], future: Future[Verdict]
) -> dict[str, Any]:
    """A sample with the verdict that `future` holds. Raises UserError for a malformed record."""
    try:
        return with_verdict(row, grading, future.result())
    except GradingError as error:
        raise UserError(f"{row['item']}: its grading record is malformed: {error}") from None


def with_verdict(row: dict[str, Any], grading: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    """A sample with a verdict, in the place of the one it may have."""
    answer = verdict.parts.get("answer")
    if grading["kind"] == "reasoning_gym":
        # Its graders do not repeat the answer that they found.
        answer = last_tag(final_part(row["response"], grading))
    return {
        **row,
        "score": verdict.score,
        "verdict": kind_of(verdict.score, verdict.reason),
        "reason": verdict.reason,
        "parts": verdict.parts,
        "answer": None if answer is None else str(answer),
    }
