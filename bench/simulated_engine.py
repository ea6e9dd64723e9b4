"""A fleet in simulated time: response lengths and scores are drawn, generation costs no compute.

For questions about the sampler that a real engine cannot answer in a test's time: which groups a
rule of acceptance prefers, how long a step takes at 64 engines, how many tokens are in vain.
Lengths are log-normal with a share cut at the limit, as seen in long-reasoning RL. An engine
computes up to `slots` sequences at once, one token each per tick; a tick takes
`base_seconds + sequence_seconds * running`, the shape of a memory-bound decoder.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
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


@dataclass
class _Running:
    request: GenerationRequest
    length: int
    finish_reason: str
    score: float
    done: float = 0.0


class _Engine:
    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.running: list[_Running] = []
        self.queue: deque[_Running] = deque()

    def admit(self) -> None:
        while self.queue and len(self.running) < self.slots:
            self.running.append(self.queue.popleft())


class SimulatedFleet:
    """Implements `protocol.GenerationEngine` in simulated time.

    Attributes:
        now: simulated seconds.
        generated_tokens: response tokens made so far.
        busy_seconds: sum over engines of the time with at least one sequence.
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
        self._engines = [_Engine(slots) for _ in range(engines)]
        self._base = base_seconds
        self._per_sequence = sequence_seconds

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        groups: dict[tuple[int, ...], list[GenerationRequest]] = {}
        for request in requests:
            groups.setdefault(tuple(request.prompt_token_ids), []).append(request)
        for group in groups.values():
            engine = min(self._engines, key=lambda e: len(e.running) + len(e.queue))
            for request in group:
                prompt_id = str(request.prompt_token_ids[0])
                engine.queue.append(_Running(request, *self.world.response(prompt_id, request.seed)))

    def poll(self, max_wait: float) -> list[GenerationResult]:
        """Jump to the next time that a response finishes."""
        ticks, waits = [], []
        for engine in self._engines:
            engine.admit()
            tick = self._base + self._per_sequence * len(engine.running)
            ticks.append(tick)
            waits += [(r.length - r.done) * tick for r in engine.running]
        if not waits:
            return []
        step = min(waits)
        self.now += step
        results = []
        for engine, tick in zip(self._engines, ticks, strict=True):
            tokens = step / tick
            self.busy_seconds += step * bool(engine.running)
            self.generated_tokens += tokens * len(engine.running)
            for running in engine.running:
                running.done += tokens
            finished = [r for r in engine.running if r.done >= r.length - 1e-6]
            engine.running = [r for r in engine.running if r.done < r.length - 1e-6]
            results += [
                GenerationResult(
                    request_id=r.request.request_id,
                    token_ids=[0] * r.length,
                    logprobs=[0.0] * r.length,
                    finish_reason=r.finish_reason,
                    text=str(r.score),
                    weight_version=0,
                )
                for r in finished
            ]
        return results

    def abort(self, request_ids: Sequence[str]) -> int:
        dropped = set(request_ids)
        wasted = 0.0
        for engine in self._engines:
            wasted += sum(r.done for r in engine.running if r.request.request_id in dropped)
            engine.running = [r for r in engine.running if r.request.request_id not in dropped]
            engine.queue = deque(r for r in engine.queue if r.request.request_id not in dropped)
        return round(wasted)


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
    """Prompts 0, 1, 2, ... without end, or `size` of them epoch by epoch."""

    def __init__(self, size: int | None = None) -> None:
        self._size = size
        self._next = 0
        self._queue: deque[tuple[Prompt, int]] = deque()

    def draw(self) -> tuple[Prompt, int]:
        if self._queue:
            return self._queue.popleft()
        epoch, index = divmod(self._next, self._size) if self._size else (0, self._next)
        self._next += 1
        prompt = Prompt(str(index), "math", f"task{index % 3}", [], [index], {"kind": "simulated"})
        return prompt, epoch

    def put_back(self, prompts: list[tuple[Prompt, int]]) -> None:
        self._queue.extendleft(reversed(prompts))
