"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a full batch of groups with signal.

The batch is the first B groups with signal in the order their prompts were drawn. Taking them in
the order they finish would prefer short responses: a long group in flight when the batch fills
up would be lost, a short one not. In prompt order a group's length decides nothing, and neither
does the number of engines or the load of the machine, so a run repeats itself.

The price is that every prompt before the B-th kept one must be decided. Two things keep it low,
and neither looks at lengths:
* A group that shows two different scores is certain to be kept. Once B groups are kept or certain,
  no prompt behind the last of them can enter the batch, and its work is stopped at once.
* Prompts are started as the expected number of kept groups requires (`keep_rate`), which is known
  better with every score. A margin for chance was tried: more tokens in vain, hardly less time.

Prompts that were started in vain go back to the head of the queue, in order, and are sampled anew
from the next policy: every sample trained on comes from the policy it trains. With `carry_over`
those whose groups are complete keep them: the next batch begins with groups one update old, which
the importance weight of the loss corrects. Which prompts enter a batch is the same either way.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from prorl_nemo.algorithms.group_filter import has_signal
from prorl_nemo.errors import UserError
from prorl_nemo.records import Group, Prompt, Sample
from prorl_nemo.rollout.group_collector import GroupCollector, PendingGroup, Sampling
from prorl_nemo.rollout.keep_rate import KeepRate
from prorl_nemo.rollout.protocol import GenerationEngine, Grader, PromptSource

REJECTIONS_ON_CREDIT = 4
"""Kept groups granted before the limit of rejections applies. A run that keeps one group in ten,
with a limit of 20 rejected per kept, is then stopped by chance in fewer than 1 step in 1,000."""


class NoSignalError(UserError):
    """Almost no group carries signal: the tasks are too hard, too easy or wrongly graded."""


@dataclass
class TaskTally:
    """What became of the prompts of one task, over the prompts decided in this batch."""

    domain: str
    kept: int = 0
    rejected: int = 0
    score_sum: float = 0.0
    samples: int = 0

    @property
    def keep_rate(self) -> float:
        return self.kept / max(1, self.kept + self.rejected)

    @property
    def mean_score(self) -> float:
        return self.score_sum / max(1, self.samples)


@dataclass
class RolloutBatch:
    """A step's groups, and what they cost.

    Attributes:
        groups: with signal, in prompt order.
        rejected: groups without signal among the prompts decided.
        dropped: prompt ids the engine could not serve.
        tallies: by task, kept and rejected groups together: mean scores here are those of the
            policy, where the mean over `groups` is biased to one half.
        generated_tokens: response tokens generated in all.
        wasted_tokens: those thrown away with prompts that went back to the queue.
        stale_groups: kept groups that an earlier policy made (`carry_over`).
        seconds: wall time.
    """

    groups: list[Group] = field(default_factory=list)
    rejected: int = 0
    dropped: list[str] = field(default_factory=list)
    tallies: dict[str, TaskTally] = field(default_factory=dict)
    generated_tokens: int = 0
    wasted_tokens: int = 0
    stale_groups: int = 0
    seconds: float = 0.0

    @property
    def trained_tokens(self) -> int:
        """Response tokens of the kept groups."""
        return sum(len(s.token_ids) for group in self.groups for s in group.samples)


@dataclass(frozen=True)
class Progress:
    """For the live view: groups unless said otherwise."""

    kept: int
    certain: int
    wanted: int
    rejected: int
    in_flight: int
    samples_running: int


class DynamicSampler:
    """Fills batches from a prompt stream through engines and graders.

    Args:
        run_seed: of the run.
        carry_over: keep complete groups of prompts that go back to the queue.
        on_event: called with an event's name and details (`prompt_dropped`).
        on_progress: called whenever something may have changed.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        grader: Grader,
        prompts: PromptSource,
        run_seed: int,
        *,
        carry_over: bool = False,
        on_event: Callable[[str, dict[str, Any]], None] = lambda event, details: None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._collector = GroupCollector(engine, grader, run_seed)
        self._prompts = prompts
        self._on_event = on_event
        self._on_progress = on_progress
        self._keep_rate = KeepRate(1)
        self._carry_over = carry_over
        self._carried: dict[tuple[str, int], list[Sample]] = {}
        self._carried_sampling: Sampling | None = None

    def sample_batch(
        self, groups: int, sampling: Sampling, max_rejected_per_kept: float = 20.0
    ) -> RolloutBatch:
        """Generate until `groups` groups carry signal.

        On any error the prompts drawn go back to the queue and the engines are left idle.

        Args:
            max_rejected_per_kept: `rollout.max_rejected_per_kept` of the recipe.

        Raises:
            NoSignalError: too many groups without signal, or a whole pass over the data
                without a single one that has it.
        """
        if self._keep_rate.group_size != sampling.samples_per_prompt:
            self._keep_rate = KeepRate(sampling.samples_per_prompt)
        if sampling != self._carried_sampling:
            self._carried = {}  # A new stage: other lengths, temperature or group size.
        filling = _Filling(groups)
        started = time.monotonic()
        try:
            while not filling.full:
                wanted = filling.prompts_to_start(self._keep_rate, max_rejected_per_kept)
                drawn = [self._prompts.draw() for _ in range(wanted)]
                filling.drawn += drawn
                filling.window.extend(self._start(drawn, sampling))
                self._collector.advance()
                self._decide(filling, max_rejected_per_kept)
                cut = filling.cut_surplus()
                lost = [group for group in cut if not self._carries(group)]
                filling.batch.wasted_tokens += self._collector.abandon(lost)
                self._on_progress(filling.progress(self._collector.running))
        except BaseException:
            self._collector.abandon(filling.window)
            self._prompts.put_back(filling.drawn)
            raise
        self._prompts.put_back([(group.prompt, group.epoch) for group in filling.surplus])
        carried = [group for group in filling.surplus if self._carries(group)]
        self._carried = {_key(group.prompt, group.epoch): group.samples for group in carried}
        self._carried_sampling = sampling
        self._keep_rate.forget()
        batch = filling.batch
        batch.generated_tokens += batch.wasted_tokens + sum(group.tokens for group in carried)
        batch.seconds = time.monotonic() - started
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The groups carried over, JSON-able."""
        sampling = self._carried_sampling
        return {
            "sampling": asdict(sampling) if sampling else None,
            "carried": [
                {"prompt_id": prompt_id, "epoch": epoch, "samples": [asdict(s) for s in samples]}
                for (prompt_id, epoch), samples in self._carried.items()
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        sampling = state["sampling"]
        self._carried_sampling = Sampling(**sampling) if sampling else None
        self._carried = {
            (entry["prompt_id"], entry["epoch"]): [Sample(**s) for s in entry["samples"]]
            for entry in state["carried"]
        }

    def sample_all(self, prompts: Iterable[tuple[Prompt, int]], sampling: Sampling) -> list[Group]:
        """Every (prompt, epoch) sampled and graded, none filtered: for validation.

        Prompts the engine cannot serve are left out, with an event.
        """
        pending = self._collector.launch(prompts, sampling)
        try:
            while not all(group.complete for group in pending):
                self._collector.advance()
                done = sum(group.complete for group in pending)
                self._on_progress(
                    Progress(done, 0, len(pending), 0, len(pending), self._collector.running)
                )
        except BaseException:
            self._collector.abandon(pending)
            raise
        for group in pending:
            if group.rejected is not None:
                self._drop(group)
        return [group.group() for group in pending if group.rejected is None]

    def _start(self, drawn: list[tuple[Prompt, int]], sampling: Sampling) -> list[PendingGroup]:
        """Groups of the prompts drawn, in order; only those not carried over are generated."""
        new = [(p, epoch) for p, epoch in drawn if _key(p, epoch) not in self._carried]
        launched = iter(self._collector.launch(new, sampling)) if new else iter(())
        return [
            PendingGroup.from_samples(p, epoch, self._carried[_key(p, epoch)])
            if _key(p, epoch) in self._carried
            else next(launched)
            for p, epoch in drawn
        ]

    def _carries(self, group: PendingGroup) -> bool:
        return self._carry_over and group.complete and group.rejected is None

    def _decide(self, filling: _Filling, max_rejected_per_kept: float) -> None:
        """Settle the complete groups at the head of the window, in order."""
        while filling.window and filling.window[0].complete and not filling.full:
            group = filling.window.popleft()
            if group.rejected is not None:
                filling.batch.wasted_tokens += self._collector.abandon([group])
                filling.batch.dropped.append(group.prompt.prompt_id)
                self._drop(group)
                continue
            kept = has_signal(group.scores)
            self._keep_rate.observe(group.scores, kept)
            filling.settle(group, kept)
            if not kept:
                filling.check_limits(group, max_rejected_per_kept)

    def _drop(self, group: PendingGroup) -> None:
        details = {"prompt_id": group.prompt.prompt_id, "reason": group.rejected}
        self._on_event("prompt_dropped", details)


def _key(prompt: Prompt, epoch: int) -> tuple[str, int]:
    return prompt.prompt_id, epoch


class _Filling:
    """The state of one batch while it fills.

    `window` holds the prompts under way in prompt order; `surplus` those cut off its end.
    """

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.batch = RolloutBatch()
        self.window: deque[PendingGroup] = deque()
        self.surplus: list[PendingGroup] = []
        self.drawn: list[tuple[Prompt, int]] = []
        self._rejected_prompts: set[str] = set()

    @property
    def full(self) -> bool:
        return len(self.batch.groups) >= self.wanted

    @property
    def missing(self) -> int:
        return self.wanted - len(self.batch.groups)

    @property
    def certain(self) -> int:
        """Groups under way that will be kept whatever their other scores are."""
        return sum(group.certain for group in self.window)

    def prompts_to_start(self, keep_rate: KeepRate, max_rejected_per_kept: float) -> int:
        """How many more prompts the batch will need, given those under way."""
        if self.certain >= self.missing:
            return 0
        expected = sum(
            1.0 if group.certain else keep_rate.chance(len(group.scores))
            for group in self.window
            if group.rejected is None
        )
        # A rate below what the run tolerates would start prompts without end.
        fresh = max(keep_rate.chance(0), 1 / (1 + max_rejected_per_kept))
        return max(0, math.ceil((self.missing - expected) / fresh))

    def settle(self, group: PendingGroup, kept: bool) -> None:
        """Enter a decided group into the batch and the tallies."""
        tally = self.batch.tallies.setdefault(group.prompt.task, TaskTally(group.prompt.domain))
        tally.score_sum += sum(group.scores)
        tally.samples += len(group.scores)
        self.batch.generated_tokens += group.tokens
        if kept:
            tally.kept += 1
            self.batch.groups.append(group.group())
            self.batch.stale_groups += group.carried
        else:
            tally.rejected += 1
            self.batch.rejected += 1

    def cut_surplus(self) -> list[PendingGroup]:
        """Take the prompts that can no longer enter the batch off the end of the window."""
        needed = self.missing
        if self.certain < needed:
            return []
        keep = 0
        while needed > 0:
            needed -= self.window[keep].certain
            keep += 1
        cut = [self.window.pop() for _ in range(len(self.window) - keep)][::-1]
        self.surplus = cut + self.surplus
        return cut

    def check_limits(self, group: PendingGroup, max_rejected_per_kept: float) -> None:
        """Stop a run that cannot learn, after a rejection. In prompt order, so it repeats too."""
        kept, rejected = len(self.batch.groups), self.batch.rejected
        if rejected > max_rejected_per_kept * (kept + REJECTIONS_ON_CREDIT):
            raise NoSignalError(
                f"rollout.max_rejected_per_kept: {rejected} groups without signal for {kept} kept "
                f"(limit {max_rejected_per_kept:g} per kept one); use tasks the model solves "
                f"sometimes, or check the graders\n{self._table()}"
            )
        if not kept and group.prompt.prompt_id in self._rejected_prompts:
            raise NoSignalError(
                f"data.sources: a whole pass over the data ({rejected - 1} prompts) gave no group "
                f"with signal; use tasks the model solves sometimes, or check the graders\n"
                f"{self._table()}"
            )
        self._rejected_prompts.add(group.prompt.prompt_id)

    def progress(self, samples_running: int) -> Progress:
        return Progress(
            kept=len(self.batch.groups),
            certain=self.certain,
            wanted=self.wanted,
            rejected=self.batch.rejected,
            in_flight=len(self.window),
            samples_running=samples_running,
        )

    def _table(self) -> str:
        rows = [
            f"  {tally.domain:<14}{task:<28}{tally.kept:>5} of {tally.kept + tally.rejected:<6}"
            f"kept, mean score {tally.mean_score:.3f}"
            for task, tally in sorted(self.batch.tallies.items())
        ]
        return "\n".join(rows)
