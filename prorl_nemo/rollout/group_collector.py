"""Turn prompts into groups of graded responses: one request per sample, graded as it finishes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from prorl_nemo.records import Group, Prompt, Sample
from prorl_nemo.rollout.carried import Carried
from prorl_nemo.rollout.keep_rate import is_certain
from prorl_nemo.rollout.protocol import (
    GenerationEngine,
    GenerationRequest,
    GenerationResult,
    Grader,
)
from prorl_nemo.rollout.seeds import sample_seed

GRADING_POLL_SECONDS = 0.02
"""How long to wait for the engine while verdicts are due."""

ENGINE_POLL_SECONDS = 0.5

INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        samples_per_prompt: responses of a group.
        max_response_tokens: limit, the end-of-turn token included.
    """

    samples_per_prompt: int
    temperature: float
    max_response_tokens: int
    top_p: float = 1.0


@dataclass
class PendingGroup:
    """A prompt under way.

    Attributes:
        scores: of the samples graded so far, in the order they became known.
        certain: they differ, so the group carries signal whatever the others are.
        rejected: why the engine cannot serve the prompt, if it cannot.
        brought: response tokens made for an earlier batch, by an earlier policy.
    """

    prompt: Prompt
    epoch: int
    size: int
    request_ids: list[str]
    samples: list[Sample] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    certain: bool = False
    rejected: str | None = None
    brought: int = 0

    @property
    def complete(self) -> bool:
        return self.rejected is not None or len(self.scores) == self.size

    @property
    def tokens(self) -> int:
        """Response tokens generated for this batch, as far as they have come out."""
        return sum(len(sample.token_ids) for sample in self.samples) - self.brought

    def note_score(self, score: float) -> None:
        self.scores.append(score)
        self.certain = self.certain or is_certain(self.scores, self.size)

    def sort_scores(self) -> None:
        """The scores of a complete group in the order of its samples."""
        if self.rejected is None:
            self.scores = self.group().scores

    def group(self) -> Group:
        """The complete group, samples in their own order."""
        return Group(self.prompt, self.epoch, sorted(self.samples, key=lambda s: s.index))


class GroupCollector:
    """Keeps groups in flight through an engine and a grader.

    Args:
        run_seed: of the run; with prompt, epoch and index it seeds each sample.
    """

    def __init__(self, engine: GenerationEngine, grader: Grader, run_seed: int) -> None:
        self._engine = engine
        self._grader = grader
        self._run_seed = run_seed
        self._launched = 0
        self._generating: dict[str, tuple[PendingGroup, Sample]] = {}
        self._grading: dict[str, tuple[PendingGroup, Sample, Future[Any]]] = {}

    @property
    def running(self) -> int:
        """Samples still generating."""
        return len(self._generating)

    def launch(
        self,
        prompts: Iterable[tuple[Prompt, int]],
        sampling: Sampling,
        carried: Carried | None = None,
    ) -> list[PendingGroup]:
        """Start all samples of some (prompt, epoch) pairs, or go on with what `suspend` left."""
        groups: list[PendingGroup] = []
        requests: list[GenerationRequest] = []
        for prompt, epoch in prompts:
            self._launched += 1
            ids = [f"{self._launched}.{i}" for i in range(sampling.samples_per_prompt)]
            group = PendingGroup(prompt, epoch, len(ids), ids)
            groups.append(group)
            begun = {s.index: s for s in (carried or {}).get((prompt.prompt_id, epoch), ())}
            group.brought = sum(len(sample.token_ids) for sample in begun.values())
            for index, request_id in enumerate(ids):
                seed = sample_seed(self._run_seed, prompt.prompt_id, epoch, index)
                sample = begun.get(index) or Sample(index, [], [], INTERRUPTED, "", seed, 0)
                if sample.finish_reason == INTERRUPTED:
                    self._generating[request_id] = (group, sample)
                    requests.append(
                        GenerationRequest(
                            request_id=request_id,
                            prompt_token_ids=prompt.token_ids,
                            seed=seed,
                            temperature=sampling.temperature,
                            max_tokens=sampling.max_response_tokens,
                            top_p=sampling.top_p,
                            prefix=sample.token_ids,
                        )
                    )
                else:
                    self._enter(request_id, group, sample)
        if requests:
            self._engine.submit(requests)
        return groups

    def advance(self) -> None:
        """Wait a moment for responses and verdicts, and enter them into their groups."""
        wait = GRADING_POLL_SECONDS if self._grading else ENGINE_POLL_SECONDS
        for result in self._engine.poll(wait):
            self._receive(result)
        for request_id in [i for i, (_, _, verdict) in self._grading.items() if verdict.done()]:
            group, sample, future = self._grading.pop(request_id)
            verdict = future.result()
            sample.score, sample.reason = verdict.score, verdict.reason
            group.note_score(verdict.score)

    def abandon(self, groups: Sequence[PendingGroup]) -> int:
        """Stop working on groups.

        Returns:
            the response tokens generated for them in vain, finished samples included.
        """
        running = self._stop(groups)
        for request_id in running:
            del self._generating[request_id]
        cut = self._engine.interrupt(running) if running else []
        return sum(g.tokens for g in groups) + sum(len(result.token_ids) for result in cut)

    def suspend(self, groups: Iterable[PendingGroup]) -> None:
        """Stop working on groups and keep in them, ungraded or unfinished, what was made."""
        running = self._stop(groups)
        for result in self._engine.interrupt(running) if running else ():
            group, begun = self._generating[result.request_id]
            if result.rejected:
                group.rejected = result.text
            else:
                group.samples.append(_continued(begun, result))
        for request_id in running:
            group, begun = self._generating.pop(request_id)
            # Its engine died just now: what it had before remains.
            if begun.token_ids and not any(s.index == begun.index for s in group.samples):
                group.samples.append(begun)

    def _stop(self, groups: Iterable[PendingGroup]) -> list[str]:
        """Grade no more of some groups; returns their requests that still generate."""
        running = []
        for group in groups:
            for request_id in group.request_ids:
                if request_id in self._generating:
                    running.append(request_id)
                elif request_id in self._grading:
                    self._grading.pop(request_id)[2].cancel()
        return running

    def _receive(self, result: GenerationResult) -> None:
        entry = self._generating.pop(result.request_id, None)
        if entry is None:
            return
        group, begun = entry
        if result.rejected:
            group.rejected = result.text
        else:
            self._enter(result.request_id, group, _continued(begun, result))

    def _enter(self, request_id: str, group: PendingGroup, sample: Sample) -> None:
        """A finished response into its group, and to the grader unless it was graded before."""
        group.samples.append(sample)
        if sample.score is not None:
            group.note_score(sample.score)
            return
        future = self._grader.submit(request_id, group.prompt.grading, sample.text)
        self._grading[request_id] = (group, sample, future)


def _continued(begun: Sample, result: GenerationResult) -> Sample:
    """A sample with the tokens it had and those that came now."""
    return replace(
        begun,
        token_ids=[*begun.token_ids, *result.token_ids],
        engine_logprobs=[*begun.engine_logprobs, *result.logprobs],
        finish_reason=result.finish_reason,
        text=result.text,
        weight_version=begun.weight_version if begun.token_ids else result.weight_version,
    )
