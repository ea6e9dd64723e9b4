"""Dynamic sampling against the rules of NeMo-RL and OpenRLHF: simulated, and on real engines.

Ways to fill a batch of B groups with signal, on the same imagined model (log-normal response
lengths, 1-3 % cut at the limit) and the same imagined engines:
* requeue, carry_over: ours, prompt order, work stopped as soon as it cannot enter the batch
  (`dynamic_sampler`); what was under way is sampled anew or gone on with;
* rounds: 1.5 B prompts, wait for all of them, again until B are kept, surplus discarded
  (NeMo-RL, `batch_multiplier` 1.5);
* replace: B prompts, one more for each group rejected, until B are kept (OpenRLHF).

`tokens` is response tokens generated per response token trained on, `unavoidable` what it would be
if nothing were started in vain, `time` seconds a step. The last rows are two vLLM engines with a
tiny random model: real queues and aborts, and scores that fall as the imagined model's do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray
from rich.console import Console
from rich.table import Table

from bench.simulated_engine import (
    SimulatedFleet,
    SimulatedGrader,
    SimulatedPrompts,
    SimulatedVerdict,
    World,
)
from prorl_nemo.algorithms.group_filter import has_signal
from prorl_nemo.rollout.dynamic_sampler import DynamicSampler
from prorl_nemo.rollout.engine_settings import EngineSettings
from prorl_nemo.rollout.fleet import Fleet
from prorl_nemo.rollout.group_collector import GroupCollector, Sampling
from prorl_nemo.rollout.protocol import (
    GenerationEngine,
    GenerationRequest,
    GenerationResult,
    Grader,
    PromptSource,
)
from prorl_nemo.tiny_model import tiny_model
from prorl_nemo.training.session import start_ray

GROUPS = 64
SAMPLING = Sampling(samples_per_prompt=16, temperature=1.2, max_response_tokens=8192)
REAL_GROUPS = 8
REAL_SAMPLING = Sampling(samples_per_prompt=8, temperature=1.2, max_response_tokens=96)
REAL_ENGINES = 2
STEPS = 3
KEEP_RATES = (0.9, 0.6, 0.41, 0.2)
ENGINES = (1, 8, 64)
ROUND_MULTIPLIER = 1.5
SEED = 1


class Engines(GenerationEngine, Protocol):
    """Engines that know what they have done, and what is sampled on them."""

    groups: int
    sampling: Sampling
    grader: Grader
    generated_tokens: float
    busy_seconds: float | None

    @property
    def now(self) -> float: ...

    def prompts(self) -> PromptSource: ...


class Simulated(SimulatedFleet):
    """The imagined engines."""

    groups, sampling = GROUPS, SAMPLING

    def __init__(self, keep_rate: float, engines: int) -> None:
        super().__init__(World(keep_rate=keep_rate), engines, slots=256)
        self.grader: Grader = SimulatedGrader()

    def prompts(self) -> PromptSource:
        return SimulatedPrompts()


class Real:
    """Real engines; what comes out of them is counted."""

    groups, sampling = REAL_GROUPS, REAL_SAMPLING
    busy_seconds: float | None = None

    def __init__(self, fleet: Fleet, keep_rate: float) -> None:
        self._fleet = fleet
        self.grader: Grader = DrawnGrader(World(keep_rate=keep_rate))
        self.generated_tokens = 0.0

    @property
    def now(self) -> float:
        return time.monotonic()

    def prompts(self) -> PromptSource:
        return RealPrompts()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        self._fleet.submit(requests)

    def poll(self, max_wait: float) -> list[GenerationResult]:
        return self._count(self._fleet.poll(max_wait))

    def interrupt(self, request_ids: Sequence[str]) -> list[GenerationResult]:
        return self._count(self._fleet.interrupt(request_ids))

    def _count(self, results: list[GenerationResult]) -> list[GenerationResult]:
        self.generated_tokens += sum(len(result.token_ids) for result in results)
        return results


class RealPrompts(SimulatedPrompts):
    """The prompts 0, 1, 2, ... in token ids that the tiny model knows."""

    def draw(self) -> tuple[Any, int]:
        prompt, epoch = super().draw()
        number = int(prompt.prompt_id)
        tokens = [10 + number // 400 % 400, 10 + number % 400, *range(20, 50)]
        return dataclasses.replace(
            prompt, token_ids=tokens, grading={"id": prompt.prompt_id}
        ), epoch


class DrawnGrader:
    """A response is right with the solve rate of its prompt, by a hash of its text."""

    def __init__(self, world: World) -> None:
        self._world = world

    def submit(self, request_id: str, grading: dict[str, Any], text: str) -> Future[Any]:
        digest = hashlib.blake2b(f"{grading['id']} {text}".encode(), digest_size=4).digest()
        share = int.from_bytes(digest, "big") / 2**32
        verdict: Future[Any] = Future()
        verdict.set_result(SimulatedVerdict(float(share < self._world.solve_rate(grading["id"]))))
        return verdict


@dataclass(frozen=True)
class Row:
    """Means over the steps of one rule at one keep rate."""

    rule: str
    keep_rate: float
    engines: int
    real: bool
    seconds: float
    tokens_per_trained_token: float
    unavoidable_tokens_per_trained_token: float
    idle_share: float | None


Step = Callable[[], tuple[int, int]]
"""Fills one batch; returns the tokens trained on, and those of all groups that had to be decided
(0 where a rule does not tell them apart from its surplus)."""


def ours(fleet: Engines, carry_over: bool = False) -> Step:
    sampler = DynamicSampler(fleet, fleet.grader, fleet.prompts(), SEED, carry_over=carry_over)

    def step() -> tuple[int, int]:
        batch = sampler.sample_batch(fleet.groups, fleet.sampling)
        return batch.trained_tokens, batch.generated_tokens - batch.wasted_tokens

    return step


def rounds(fleet: Engines) -> Step:
    collector, prompts = GroupCollector(fleet, fleet.grader, SEED), fleet.prompts()

    def step() -> tuple[int, int]:
        kept: list[int] = []
        while len(kept) < fleet.groups:
            drawn = [prompts.draw() for _ in range(int(fleet.groups * ROUND_MULTIPLIER))]
            pending = collector.launch(drawn, fleet.sampling)
            while not all(group.complete for group in pending):
                collector.advance()
            kept += [group.tokens for group in pending if has_signal(group.scores)]
        return sum(kept[: fleet.groups]), 0

    return step


def replace(fleet: Engines) -> Step:
    collector, prompts = GroupCollector(fleet, fleet.grader, SEED), fleet.prompts()

    def step() -> tuple[int, int]:
        pending = collector.launch([prompts.draw() for _ in range(fleet.groups)], fleet.sampling)
        trained = decided = 0
        while pending:
            collector.advance()
            complete = [group for group in pending if group.complete]
            pending = [group for group in pending if not group.complete]
            for group in complete:
                decided += group.tokens
                if has_signal(group.scores):
                    trained += group.tokens
                else:
                    pending += collector.launch([prompts.draw()], fleet.sampling)
        return trained, decided

    return step


RULES: dict[str, Callable[[Engines], Step]] = {
    "requeue": ours,
    "carry_over": partial(ours, carry_over=True),
    "rounds": rounds,
    "replace": replace,
}


def measure(rule: str, keep_rate: float, count: int, fleet: Engines) -> Row:
    step = RULES[rule](fleet)
    step()  # The first batch learns the keep rate.
    start, tokens, busy = fleet.now, fleet.generated_tokens, fleet.busy_seconds
    results = [step() for _ in range(STEPS)]
    trained = sum(result[0] for result in results)
    seconds = fleet.now - start
    idle = None
    if busy is not None and fleet.busy_seconds is not None:
        idle = 1 - (fleet.busy_seconds - busy) / (seconds * count)
    return Row(
        rule=rule,
        keep_rate=keep_rate,
        engines=count,
        real=isinstance(fleet, Real),
        seconds=seconds / STEPS,
        tokens_per_trained_token=(fleet.generated_tokens - tokens) / trained,
        unavoidable_tokens_per_trained_token=sum(result[1] for result in results) / trained,
        idle_share=idle,
    )


def measure_real() -> list[Row]:
    """The rules on real engines at two keep rates."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model("llama", Path(folder) / "model")
        settings = EngineSettings(
            str(model), "float32", 256, max_sequences=64, kv_cache_bytes=64 << 20, threads=1
        )
        start_ray()
        try:
            fleet = Fleet(settings, REAL_ENGINES)
            rows = [
                measure(rule, keep_rate, REAL_ENGINES, Real(fleet, keep_rate))
                for keep_rate in (0.6, 0.41)
                for rule in RULES
            ]
            fleet.shutdown()
        finally:
            ray.shutdown()
    return rows


def main(json_path: Path | None) -> None:
    """Run the bench, print its table and write the figures to `json_path`."""
    rows = [
        measure(rule, keep_rate, engines, Simulated(keep_rate, engines))
        for keep_rate in KEEP_RATES
        for engines in ENGINES
        for rule in RULES
    ] + measure_real()
    table = Table(
        title=f"{GROUPS} groups of {SAMPLING.samples_per_prompt} a step; real: {REAL_GROUPS}"
    )
    for column in ("keep rate", "engines", "rule", "time", "tokens", "unavoidable", "idle"):
        table.add_column(column, justify="right")
    for row in rows:
        unavoidable = row.unavoidable_tokens_per_trained_token
        table.add_row(
            f"{row.keep_rate:.2f}",
            f"{row.engines}{' real' if row.real else ''}",
            row.rule,
            f"{row.seconds:.1f}" if row.real else f"{row.seconds:.0f}",
            f"{row.tokens_per_trained_token:.2f}",
            f"{unavoidable:.2f}" if unavoidable else "",
            "" if row.idle_share is None else f"{row.idle_share:.2f}",
        )
    Console().print(table)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1))
