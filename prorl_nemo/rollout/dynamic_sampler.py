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
they keep what was made for them, and the next policy finishes what it finds unfinished (partial
rollouts, Kimi k1.5, arXiv 2501.12599, section 2.6). Keeping only complete groups, or complete
responses, would prefer short ones: a long one would get a second draw, a short one not. The
importance weight of the loss corrects for the older policy, token by token. Which prompts enter a
batch is the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from prorl_nemo.algorithms.group_filter import has_signal
from prorl_nemo.records import Group, Prompt, Sample
from prorl_nemo.rollout.carried import carried_state, load_carried
from prorl_nemo.rollout.filling import Filling, Progress, RolloutBatch
from prorl_nemo.rollout.group_collector import GroupCollector, PendingGroup, Sampling
from prorl_nemo.rollout.keep_rate import KeepRate
from prorl_nemo.rollout.prompt_history import PromptHistory
from prorl_nemo.rollout.protocol import GenerationEngine, Grader, PromptSource


class DynamicSampler:
    """Fills batches from a prompt stream through engines and graders.

    Args:
        run_seed: of the run.
        carry_over: prompts that go back to the queue keep what was made for them.
        history: draws instead of `prompts`, which it wraps, and learns from every batch.
        replace: start another prompt for each group without signal; otherwise the batch has fewer.
        lockstep: start prompts only when all before them are complete. An engine's rounding
            depends on what it computes together; in lockstep that is the same in every run.
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
        history: PromptHistory | None = None,
        replace: bool = True,
        lockstep: bool = False,
        on_event: Callable[[str, dict[str, Any]], None] = lambda event, details: None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._collector = GroupCollector(engine, grader, run_seed)
        self._prompts: PromptSource = history or prompts
        self._history = history
        self._on_event = on_event
        self._on_progress = on_progress
        self._keep_rate = KeepRate(1)
        self._carry_over = carry_over
        self._replace = replace
        self._lockstep = lockstep
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
            NoSignalError: too many groups without signal or prompts that the engines refuse, or
                a whole pass over the data without a single group with signal.
        """
        if self._keep_rate.group_size != sampling.samples_per_prompt:
            self._keep_rate = KeepRate(sampling.samples_per_prompt)
        if sampling != self._carried_sampling:
            self._carried = {}  # A new stage: other lengths, temperature or group size.
        filling = Filling(groups, self._replace)
        passed_over = self._history.passed_over if self._history else 0
        known = self._keep_rate.state_dict()
        try:
            while not filling.full:
                wanted = filling.prompts_to_start(self._keep_rate, max_rejected_per_kept)
                drawn = [self._prompts.draw() for _ in range(wanted)]
                filling.drawn += drawn
                filling.window.extend(self._collector.launch(drawn, sampling, self._carried))
                self._advance(filling)
                self._decide(filling, max_rejected_per_kept)
                cut = filling.cut_surplus()
                if self._carry_over:
                    self._collector.suspend(cut)
                else:
                    filling.batch.wasted_tokens += self._collector.abandon(cut)
                self._on_progress(filling.progress(self._collector.running))
        except BaseException:
            # First, because engines that die may be the error, and then refuse to abort as well.
            self._prompts.put_back(filling.drawn)
            self._keep_rate.load_state_dict(known)  # Its evidence comes again with the prompts.
            self._collector.abandon(filling.window)
            raise
        self._prompts.put_back([(group.prompt, group.epoch) for group in filling.surplus])
        kept = [g for g in filling.surplus if self._carry_over and g.rejected is None]
        for prompt, epoch in filling.drawn:
            self._carried.pop((prompt.prompt_id, epoch), None)
        self._carried |= {(g.prompt.prompt_id, g.epoch): g.samples for g in kept if g.samples}
        self._carried_sampling = sampling
        self._keep_rate.forget()
        batch = filling.batch
        if self._history:
            self._history.record(batch.decided)
            batch.passed_over = self._history.passed_over - passed_over
        batch.generated_tokens += batch.wasted_tokens + sum(group.tokens for group in kept)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What was carried over, and what is known of keep rate and prompts; JSON-able."""
        sampling = self._carried_sampling
        return {
            "keep_rate": self._keep_rate.state_dict(),
            "history": self._history.state_dict() if self._history else None,
            "sampling": asdict(sampling) if sampling else None,
            "carried": carried_state(self._carried),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._keep_rate.load_state_dict(state["keep_rate"])
        if self._history:
            self._history.load_state_dict(state["history"])
        sampling = state["sampling"]
        self._carried_sampling = Sampling(**sampling) if sampling else None
        self._carried = load_carried(state["carried"])

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
                    Progress(
                        kept=done,
                        certain=0,
                        wanted=len(pending),
                        rejected=0,
                        samples_running=self._collector.running,
                    )
                )
        except BaseException:
            self._collector.abandon(pending)
            raise
        for group in pending:
            if group.rejected is not None:
                self._drop(group)
        return [group.group() for group in pending if group.rejected is None]

    def _advance(self, filling: Filling) -> None:
        """Take in what is new; in lockstep, until every prompt under way is complete."""
        self._collector.advance()
        while self._lockstep and not all(group.complete for group in filling.window):
            self._on_progress(filling.progress(self._collector.running))
            self._collector.advance()
        if self._lockstep:
            for group in filling.window:
                group.sort_scores()

    def _decide(self, filling: Filling, max_rejected_per_kept: float) -> None:
        """Settle the complete groups at the head of the window, in order."""
        while filling.window and filling.window[0].complete and not filling.full:
            group = filling.window.popleft()
            if group.rejected is not None:
                filling.batch.wasted_tokens += self._drop(group)
                filling.batch.dropped.append(group.prompt.prompt_id)
                filling.check_refused(group, max_rejected_per_kept)
                continue
            kept = has_signal(group.scores)
            self._keep_rate.observe(group.scores, kept)
            filling.settle(group, kept)
            if not kept:
                filling.check_limits(group, max_rejected_per_kept)

    def _drop(self, group: PendingGroup) -> int:
        """Leave out a prompt that the engine refuses; returns the tokens made in vain."""
        wasted = self._collector.abandon([group])
        details = {"prompt_id": group.prompt.prompt_id, "reason": group.rejected}
        self._on_event("prompt_dropped", details)
        return wasted
