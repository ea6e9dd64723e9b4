"""A batch while it fills: prompts under way in their order, what was kept, when to give up."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field

from prorl_nemo.errors import UserError
from prorl_nemo.records import Group, Prompt
from prorl_nemo.rollout.group_collector import PendingGroup
from prorl_nemo.rollout.keep_rate import KeepRate

REJECTIONS_ON_CREDIT = 4
"""Kept groups granted before the limit of rejections applies. A run that keeps one group in ten,
with a limit of 20 rejected per kept, is then stopped by chance in fewer than 1 step in 1,000."""


class NoSignalError(UserError):
    """Almost no group carries signal: the tasks are too hard, too easy, wrongly graded or refused
    by the engines."""


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
        decided: (prompt id, kept) of every prompt decided, in order.
        passed_over: draws that the history of the prompts saved.
    """

    groups: list[Group] = field(default_factory=list)
    rejected: int = 0
    dropped: list[str] = field(default_factory=list)
    tallies: dict[str, TaskTally] = field(default_factory=dict)
    generated_tokens: int = 0
    wasted_tokens: int = 0
    decided: list[tuple[str, bool]] = field(default_factory=list)
    passed_over: int = 0

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
    samples_running: int


class Filling:
    """The state of one batch while it fills.

    `window` holds the prompts under way in prompt order; `surplus` those cut off its end.

    Args:
        wanted: groups of the batch.
        replace: start another prompt for each group without signal; otherwise its place in the
            batch stays empty, unless all are.
    """

    def __init__(self, wanted: int, replace: bool = True) -> None:
        self.wanted, self._replace = wanted, replace
        self.batch = RolloutBatch()
        self.window: deque[PendingGroup] = deque()
        self.surplus: list[PendingGroup] = []
        self.drawn: list[tuple[Prompt, int]] = []
        self._rejected_prompts: Counter[str] = Counter()

    @property
    def full(self) -> bool:
        return self.missing <= 0

    @property
    def missing(self) -> int:
        """Groups that the batch still needs."""
        kept = len(self.batch.groups)
        if self._replace:
            return self.wanted - kept
        # A step needs one group at least.
        return max(self.wanted - kept - self.batch.rejected, 0 if kept else 1)

    @property
    def certain(self) -> int:
        """Groups under way that will be kept whatever their other scores are."""
        return sum(group.certain for group in self.window)

    def prompts_to_start(self, keep_rate: KeepRate, max_rejected_per_kept: float) -> int:
        """How many more prompts the batch will need, given those under way."""
        if not self._replace:
            return self.missing - sum(group.rejected is None for group in self.window)
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
        self.batch.decided.append((group.prompt.prompt_id, kept))
        if kept:
            tally.kept += 1
            self.batch.groups.append(group.group())
        else:
            tally.rejected += 1
            self.batch.rejected += 1

    def cut_surplus(self) -> list[PendingGroup]:
        """Take the prompts that can no longer enter the batch off the end of the window."""
        if not self._replace:
            return []  # No more were started than it takes.
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
        if self._beyond(rejected, max_rejected_per_kept):
            raise NoSignalError(
                f"rollout.max_rejected_per_kept: {rejected} groups without signal for {kept} kept "
                f"(limit {max_rejected_per_kept:g} per kept one); use tasks the model solves "
                f"sometimes, or check the graders\n{self._table()}"
            )
        self._rejected_prompts[group.prompt.prompt_id] += 1
        # Twice may be the end of one shuffled pass and the beginning of the next. Whatever comes a
        # third time has seen a whole pass go by.
        if not kept and self._rejected_prompts[group.prompt.prompt_id] > 2:
            prompts = len(self._rejected_prompts)
            raise NoSignalError(
                f"data.sources: a whole pass over the data ({prompts} prompts) gave no group "
                f"with signal; use tasks the model solves sometimes, or check the graders\n"
                f"{self._table()}"
            )

    def check_refused(self, group: PendingGroup, max_rejected_per_kept: float) -> None:
        """Stop a run whose engines refuse nearly every prompt: it would look for one for ever."""
        dropped, kept = len(self.batch.dropped), len(self.batch.groups)
        if self._beyond(dropped, max_rejected_per_kept):
            raise NoSignalError(
                f"rollout.max_rejected_per_kept: the engines refuse {dropped} prompts for {kept} "
                f"groups kept (limit {max_rejected_per_kept:g} per kept one), the last because of: "
                f"{group.rejected}"
            )

    def _beyond(self, count: int, max_rejected_per_kept: float) -> bool:
        return count > max_rejected_per_kept * (len(self.batch.groups) + REJECTIONS_ON_CREDIT)

    def progress(self, samples_running: int) -> Progress:
        return Progress(
            kept=len(self.batch.groups),
            certain=self.certain,
            wanted=self.wanted,
            rejected=self.batch.rejected,
            samples_running=samples_running,
        )

    def _table(self) -> str:
        rows = [
            f"  {tally.domain:<14}{task:<28}{tally.kept:>5} of {tally.kept + tally.rejected:<6}"
            f"kept, mean score {tally.mean_score:.3f}"
            for task, tally in sorted(self.batch.tallies.items())
        ]
        return "\n".join(rows)
