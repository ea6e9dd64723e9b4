"""From accepted groups to the batch the trainer works on. Sample i is the i-th over all groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from prorl_nemo.algorithms.batch_advantages import BatchAdvantages, batch_advantages
from prorl_nemo.algorithms.reward_shaping import CosineLength, Overlong
from prorl_nemo.recipe import Recipe
from prorl_nemo.records import Group
from prorl_nemo.schedule.stages import StageSettings
from prorl_nemo.training.batch import TrainingBatch


def advantages_of(
    groups: Sequence[Group], recipe: Recipe, stage: StageSettings, cosine: CosineLength | None
) -> BatchAdvantages:
    """Shaped rewards and advantages [samples] of a rollout batch, by the recipe's rules.

    Args:
        cosine: the length penalty, in steps that have it.
    """
    samples = [sample for group in groups for sample in group.samples]
    sizes = torch.tensor([len(group.samples) for group in groups])
    overlong = recipe.shaping.overlong
    return batch_advantages(
        torch.tensor([score for group in groups for score in group.scores], dtype=torch.float64),
        torch.repeat_interleave(torch.arange(len(groups)), sizes),
        torch.tensor([len(sample.token_ids) for sample in samples]),
        torch.tensor([sample.truncated for sample in samples]),
        stage.max_response_tokens,
        method=recipe.algorithm.advantage,
        statistics=recipe.algorithm.statistics,
        truncated_factor=stage.truncated_factor,
        overlong=Overlong(overlong.buffer_tokens, overlong.weight) if overlong else None,
        cosine=cosine,
    )


def training_batch(
    groups: Sequence[Group], outcome: BatchAdvantages, temperature: float, version: int = 0
) -> TrainingBatch:
    """What the trainer computes on: the groups that kept their variance after shaping.

    Args:
        version: of the weights the engines had; samples begun with older ones are `stale`.
    """
    batch = TrainingBatch([], [], [], [], [], temperature)
    first = 0
    for group in groups:
        indices = range(first, first + len(group.samples))
        first = indices.stop
        if not bool(outcome.kept[indices.start]):
            continue
        batch.prompts.append(list(group.prompt.token_ids))
        start = len(batch.responses)
        batch.groups.append(list(range(start, start + len(group.samples))))
        for sample, index in zip(group.samples, indices, strict=True):
            batch.responses.append(np.asarray(sample.token_ids, dtype=np.int64))
            batch.engine_logprobs.append(np.asarray(sample.engine_logprobs, dtype=np.float32))
            batch.advantages.append(float(outcome.advantages[index]))
            batch.stale.append(sample.weight_version < version)
    return batch
