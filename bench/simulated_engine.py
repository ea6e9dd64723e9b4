"""A fleet in simulated time: response lengths and scores are drawn, generation costs no compute.

For questions about the sampler that a real engine cannot answer in a test's time: which groups a
rule of acceptance prefers, how long a step takes at 64 engines, how many tokens are in vain.
Lengths are log-normal with a share cut at the limit, as seen in long-reasoning RL. An engine
computes up to `slots` sequences at once, one token each per tick; a tick takes
`base_seconds + sequence_seconds * running`, the shape of a memory-bound decoder.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from prorl_nemo.records import Prompt
from prorl_nemo.rollout.protocol import GenerationRequest, GenerationResult


@dataclass(frozen=True)
class World:
    """What the imagined model does.

    Attributes:
        keep_rate: share of prompts whose solve rate is 0.5; the others are solved never
            (two in three) or always.
        median_tokens, sigma: of the log-normal response length; a prompt's own difficulty
            carries half of the log variance.
        limit: response limit, tokens.
    """

    keep_rate: float = 0.41
    median_tokens: float = 2500.0
    sigma: float = 0.55
    limit: int = 8192

    def solve_rate(self, prompt_id: str) -> float:
        draw = random.Random(f"solve {prompt_id}").random()
        if draw < self.keep_rate:
            return 0.5
        return 0.0 if draw < self.keep_rate + (1 - self.keep_rate) * 2 / 3 else 1.0

    def response(self, prompt_id: str, seed: int) -> tuple[int, str, float]:
        """Length in tokens, finish reason and score of the response drawn with `seed`."""
        share = self.sigma / math.sqrt(2)
        own = random.Random(f"length {prompt_id}").gauss(0, share)
        rng = random.Random(seed)
        length = round(self.median_tokens * math.exp(own + rng.gauss(0, share)))
        score = float(rng.random() < self.solve_rate(prompt_id))
        if length >= self.limit:
            return self.limit, "length", score
        return max(1, length), "stop", score


@dataclass(order=True)
class _Job:
    """`length` tokens to make; `finish` is when, in ticks of its engine."""

    finish: float
    request_id: str
    length: int = field(compare=False)
    finish_reason: str = field(compare=False)
    score: float = field(compare=False)


class _Engine:
    """Sequences advance together, one token a tick, so a heap of finishing ticks suffices."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.ticks = 0.0
        self.running: list[_Job] = []
        self.queue: deque[_Job] = deque()

    def admit(self) -> None:
        while self.queue and len(self.running) < self.slots:
            job = self.queue.popleft()
            job.finish = self.ticks + job.length
            heapq.heappush(self.running, job)

    def drop(self, request_ids: set[str]) -> dict[str, int]:
        """Tokens made for each request dropped. The one under way is lost, never the last."""
        made = {
            job.request_id: min(job.length - 1, int(job.length - (job.finish - self.ticks)))
            for job in self.running
            if job.request_id in request_ids
        }
        made |= {job.request_id: 0 for job in self.queue if job.request_id in request_ids}
        self.running = [job for job in self.running if job.request_id not in request_ids]
        heapq.heapify(self.running)
        self.queue = deque(job for job in self.queue if job.request_id not in request_ids)
        return made


class SimulatedFleet:
    """Implements `protocol.GenerationEngine` in simulated time.

    Attributes:
        now: simulated seconds.
        generated_tokens: response tokens made so far.
        busy_seconds: sum over engines of the time with at least one sequence.
        weight_version: what responses are marked with.
    """

    def __init__(
        self,
        world: World,
        engines: int = 1,
        slots: int = 128,
        base_seconds: float = 0.01,
        sequence_seconds: float = 0.0001,
    ) -> None:
        self.world = world
        self.now = 0.0
        self.generated_tokens = 0.0
        self.busy_seconds = 0.0
        self.weight_version = 0
        self._engines = [_Engine(slots) for _ in range(engines)]
        self._base = base_seconds
        self._per_sequence = sequence_seconds

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        groups: dict[int, list[GenerationRequest]] = {}
        for request in requests:
            groups.setdefault(request.prompt_token_ids[0], []).append(request)
        for index, group in groups.items():
            engine = min(self._engines, key=lambda e: len(e.running) + len(e.queue))
            for request in group:
                length, finish_reason, score = self.respond(str(index), request)
                left = length - len(request.prefix)
                engine.queue.append(_Job(0.0, request.request_id, left, finish_reason, score))

    def respond(self, prompt_id: str, request: GenerationRequest) -> tuple[int, str, float]:
        """Length in tokens (prefix included), finish reason and score of the response."""
        return self.world.response(prompt_id, request.seed)

    def poll(self, max_wait: float) -> list[GenerationResult]:
        """Jump to the next time that a response finishes."""
        for engine in self._engines:
            engine.admit()
        active = [engine for engine in self._engines if engine.running]
        if not active:
            return []
        tick = [self._base + self._per_sequence * len(engine.running) for engine in active]
        step = min(
            (engine.running[0].finish - engine.ticks) * seconds
            for engine, seconds in zip(active, tick, strict=True)
        )
        self.now += step
        self.busy_seconds += step * len(active)
        finished = []
        for engine, seconds in zip(active, tick, strict=True):
            self.generated_tokens += step / seconds * len(engine.running)
            engine.ticks += step / seconds
            while engine.running and engine.running[0].finish <= engine.ticks + 1e-6:
                finished.append(heapq.heappop(engine.running))
        return [
            self._result(job.request_id, job.length, job.finish_reason, str(job.score))
            for job in finished
        ]

    def interrupt(self, request_ids: Sequence[str]) -> list[GenerationResult]:
        wanted = set(request_ids)
        return [
            self._result(request_id, tokens, "interrupted", "")
            for engine in self._engines
            for request_id, tokens in engine.drop(wanted).items()
        ]

    def _result(self, request_id: str, tokens: int, reason: str, text: str) -> GenerationResult:
        return GenerationResult(
            request_id, [0] * tokens, [0.0] * tokens, reason, text, self.weight_version
        )


@dataclass(frozen=True)
class SimulatedVerdict:
    score: float
    reason: str = ""


class SimulatedGrader:
    """Reads the score the simulated response carries, at once."""

    def submit(self, request_id: str, grading: dict[str, Any], text: str) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(SimulatedVerdict(float(text)))
        return future


class SimulatedPrompts:
    """Prompts 0, 1, 2, ... without end, or `size` of them epoch by epoch.

    Attributes:
        waiting: prompts that were put back.
    """

    def __init__(self, size: int | None = None) -> None:
        self._size = size
        self._next = 0
        self.waiting: deque[tuple[Prompt, int]] = deque()

    def draw(self) -> tuple[Prompt, int]:
        if self.waiting:
            return self.waiting.popleft()
        epoch, index = divmod(self._next, self._size) if self._size else (0, self._next)
        self._next += 1
        prompt = Prompt(str(index), "math", f"task{index % 3}", [], [index], {"kind": "simulated"})
        return prompt, epoch

    def put_back(self, prompts: list[tuple[Prompt, int]]) -> None:
        self.waiting.extendleft(reversed(prompts))
