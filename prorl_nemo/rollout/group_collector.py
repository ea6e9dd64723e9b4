"""Turn prompts into groups of graded responses: one request per sample, graded as it finishes."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from prorl_nemo.records import Group, Prompt, Sample
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
        carried: complete since an earlier batch, from an earlier policy.
    """

    prompt: Prompt
    epoch: int
    size: int
    request_ids: list[str]
    samples: list[Sample] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    certain: bool = False
    rejected: str | None = None
    carried: bool = False

    @classmethod
    def from_samples(cls, prompt: Prompt, epoch: int, samples: list[Sample]) -> PendingGroup:
        """A group carried over from an earlier batch."""
        scores = Group(prompt, epoch, samples).scores
        certain = is_certain(scores, len(samples))
        return cls(prompt, epoch, len(samples), [], samples, scores, certain, carried=True)

    @property
    def complete(self) -> bool:
        return self.rejected is not None or len(self.scores) == self.size

    @property
    def tokens(self) -> int:
        """Response tokens of the samples that have finished, 0 where an earlier batch paid them."""
        return 0 if self.carried else sum(len(sample.token_ids) for sample in self.samples)

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
        self._generating: dict[str, tuple[PendingGroup, int, int]] = {}
        self._grading: dict[str, tuple[PendingGroup, Sample, Future[Any]]] = {}

    @property
    def running(self) -> int:
        """Samples still generating."""
        return len(self._generating)

    def launch(
        self, prompts: Iterable[tuple[Prompt, int]], sampling: Sampling
    ) -> list[PendingGroup]:
        """Start all samples of some (prompt, epoch) pairs."""
        groups, requests = [], []
        for prompt, epoch in prompts:
            self._launched += 1
            ids = [f"{self._launched}.{i}" for i in range(sampling.samples_per_prompt)]
            group = PendingGroup(prompt, epoch, len(ids), ids)
            groups.append(group)
            for index, request_id in enumerate(ids):
                seed = sample_seed(self._run_seed, prompt.prompt_id, epoch, index)
                self._generating[request_id] = (group, index, seed)
                requests.append(
                    GenerationRequest(
                        request_id=request_id,
                        prompt_token_ids=prompt.token_ids,
                        seed=seed,
                        temperature=sampling.temperature,
                        max_tokens=sampling.max_response_tokens,
                        top_p=sampling.top_p,
                    )
                )
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
            group.scores.append(verdict.score)
            group.certain = group.certain or is_certain(group.scores, group.size)

    def abandon(self, groups: Iterable[PendingGroup]) -> int:
        """Stop working on groups.

        Returns:
            the response tokens generated for them in vain, finished samples included.
        """
        wasted, running = 0, []
        for group in groups:
            wasted += group.tokens
            for request_id in group.request_ids:
                if self._generating.pop(request_id, None) is not None:
                    running.append(request_id)
                elif request_id in self._grading:
                    self._grading.pop(request_id)[2].cancel()
        return wasted + (self._engine.abort(running) if running else 0)

    def _receive(self, result: GenerationResult) -> None:
        entry = self._generating.pop(result.request_id, None)
        if entry is None:
            return
        group, index, seed = entry
        if result.rejected:
            group.rejected = result.text
            return
        sample = Sample(
            index=index,
            token_ids=result.token_ids,
            engine_logprobs=result.logprobs,
            finish_reason=result.finish_reason,
            text=result.text,
            seed=seed,
            weight_version=result.weight_version,
        )
        group.samples.append(sample)
        future = self._grader.submit(result.request_id, group.prompt.grading, result.text)
        self._grading[result.request_id] = (group, sample, future)
