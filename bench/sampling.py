"""Dynamic sampling against the rules of NeMo-RL and OpenRLHF, in one simulator.

Three ways to fill a batch of B groups with signal, on the same imagined model (log-normal response
lengths, 1-3 % cut at the limit) and the same imagined engines:
* ours: prompt order, work stopped as soon as it cannot enter the batch (`dynamic_sampler`);
* rounds: 1.5 B prompts, wait for all of them, again until B are kept, surplus discarded
  (NeMo-RL, `batch_multiplier` 1.5);
* replace: B prompts, one more for each group rejected, until B are kept (OpenRLHF).

`tokens` is response tokens generated per response token trained on, `unavoidable` what it would be
if nothing were started in vain, `time` simulated seconds a step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.simulated_engine import SimulatedFleet, SimulatedGrader, SimulatedPrompts, World
from prorl_nemo.algorithms.group_filter import has_signal
from prorl_nemo.rollout.dynamic_sampler import DynamicSampler
from prorl_nemo.rollout.group_collector import GroupCollector, Sampling

GROUPS = 64
SAMPLING = Sampling(samples_per_prompt=16, temperature=1.2, max_response_tokens=8192)
STEPS = 3
KEEP_RATES = (0.9, 0.6, 0.41, 0.2)
ENGINES = (1, 8, 64)
ROUND_MULTIPLIER = 1.5
SEED = 1


@dataclass(frozen=True)
class Row:
    """Means over the steps of one rule at one keep rate."""

    rule: str
    keep_rate: float
    engines: int
    seconds: float
    tokens_per_trained_token: float
    unavoidable_tokens_per_trained_token: float
    idle_share: float


Step = Callable[[], tuple[int, int]]
"""Fills one batch; returns the tokens trained on, and those of all groups that had to be decided
(0 where a rule does not tell them apart from its surplus)."""


def ours(fleet: SimulatedFleet) -> Step:
    sampler = DynamicSampler(fleet, SimulatedGrader(), SimulatedPrompts(), SEED)

    def step() -> tuple[int, int]:
        batch = sampler.sample_batch(GROUPS, SAMPLING)
        return batch.trained_tokens, batch.generated_tokens - batch.wasted_tokens

    return step


def rounds(fleet: SimulatedFleet) -> Step:
    collector, prompts = GroupCollector(fleet, SimulatedGrader(), SEED), SimulatedPrompts()

    def step() -> tuple[int, int]:
        kept: list[int] = []
        while len(kept) < GROUPS:
            drawn = [prompts.draw() for _ in range(int(GROUPS * ROUND_MULTIPLIER))]
            pending = collector.launch(drawn, SAMPLING)
            while not all(group.complete for group in pending):
                collector.advance()
            kept += [group.tokens for group in pending if has_signal(group.scores)]
        return sum(kept[:GROUPS]), 0

    return step


def replace(fleet: SimulatedFleet) -> Step:
    collector, prompts = GroupCollector(fleet, SimulatedGrader(), SEED), SimulatedPrompts()

    def step() -> tuple[int, int]:
        pending = collector.launch([prompts.draw() for _ in range(GROUPS)], SAMPLING)
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
                    pending += collector.launch([prompts.draw()], SAMPLING)
        return trained, decided

    return step


RULES: dict[str, Callable[[SimulatedFleet], Step]] = {
    "ours": ours,
    "rounds": rounds,
    "replace": replace,
}


def measure(rule: str, keep_rate: float, engines: int) -> Row:
    fleet = SimulatedFleet(World(keep_rate=keep_rate), engines, slots=256)
    step = RULES[rule](fleet)
    step()  # The first batch learns the keep rate.
    start, tokens, busy = fleet.now, fleet.generated_tokens, fleet.busy_seconds
    results = [step() for _ in range(STEPS)]
    trained = sum(result[0] for result in results)
    seconds = fleet.now - start
    return Row(
        rule=rule,
        keep_rate=keep_rate,
        engines=engines,
        seconds=seconds / STEPS,
        tokens_per_trained_token=(fleet.generated_tokens - tokens) / trained,
        unavoidable_tokens_per_trained_token=sum(result[1] for result in results) / trained,
        idle_share=1 - (fleet.busy_seconds - busy) / (seconds * engines),
    )


def main(json_path: Path | None) -> None:
    """Run the bench, print its table and write the figures to `json_path`."""
    rows = [
        measure(rule, keep_rate, engines)
        for keep_rate in KEEP_RATES
        for engines in ENGINES
        for rule in RULES
    ]
    table = Table(title=f"{GROUPS} groups of {SAMPLING.samples_per_prompt} a step, simulated")
    for column in ("keep rate", "engines", "rule", "time", "tokens", "unavoidable", "idle"):
        table.add_column(column, justify="right")
    for row in rows:
        unavoidable = row.unavoidable_tokens_per_trained_token
        table.add_row(
            f"{row.keep_rate:.2f}",
            str(row.engines),
            row.rule,
            f"{row.seconds:.0f}",
            f"{row.tokens_per_trained_token:.2f}",
            f"{unavoidable:.2f}" if unavoidable else "",
            f"{row.idle_share:.2f}",
        )
    Console().print(table)
    if json_path:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1))
