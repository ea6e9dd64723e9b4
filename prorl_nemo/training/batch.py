"""The training batch: what the controller hands to every trainer rank.

Plain numpy, one array of each sort for each sample, so that it travels once
through the object store and every rank picks its part by the same pure rules.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from prorl_nemo.megatron.packing_plan import TrainingItem, items_of_group


@dataclass(frozen=True)
class StepSettings:
    """What a stage may change about an update."""

    learning_rate: float
    clip_low: float
    clip_high: float
    minibatches: int


@dataclass
class TrainingBatch:
    """Samples of a rollout, grouped by prompt.

    Attributes:
        prompts: token ids of each group's prompt.
        groups: for each group, the indices of its samples.
        responses: token ids of each sample, int64 [length].
        engine_logprobs: per token, float32 [length], of the sampling distribution.
        advantages: one for each sample.
        temperature: the sampling temperature.
        old_logprobs, reference_logprobs: float32 [length] a sample, filled in by the trainer.
        stale: of each sample, whether an earlier policy began it (`rollout.surplus: carry_over`);
            empty where none is.
    """

    prompts: list[list[int]]
    groups: list[list[int]]
    responses: list[NDArray[np.int64]]
    engine_logprobs: list[NDArray[np.float32]]
    advantages: list[float]
    temperature: float
    old_logprobs: list[NDArray[np.float32]] = field(default_factory=list)
    reference_logprobs: list[NDArray[np.float32]] = field(default_factory=list)
    stale: list[bool] = field(default_factory=list)

    @property
    def response_tokens(self) -> int:
        return sum(len(r) for r in self.responses)

    def items(
        self, groups: range, shared_prompts: bool, budget: int | None = None
    ) -> list[TrainingItem]:
        """What is computed for these groups, as items to pack; see `items_of_group`."""
        found: list[TrainingItem] = []
        for group in groups:
            samples = self.groups[group]
            responses = [self.responses[s] for s in samples]
            found += items_of_group(self.prompts[group], responses, samples, shared_prompts, budget)
        return found

    def minibatches(self, count: int) -> list[range]:
        """The groups of each minibatch: equal shares in the order they were accepted."""
        size = -(-len(self.groups) // count)
        starts = range(0, len(self.groups), size)
        return [range(s, min(s + size, len(self.groups))) for s in starts]
