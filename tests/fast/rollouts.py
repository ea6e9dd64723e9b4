"""Graded groups, and the recipe and stage they come from. For tests."""

from __future__ import annotations

from typing import Any

import torch

from prorl_nemo.algorithms.batch_advantages import BatchAdvantages
from prorl_nemo.recipe import Recipe, parse_recipe
from prorl_nemo.records import Group, Prompt, Sample
from prorl_nemo.schedule.stages import StageSettings
from prorl_nemo.training.batch import TrainingBatch
from prorl_nemo.training.rollout_batch import training_batch

STAGE = StageSettings(
    index=1,
    name="short",
    first_step=4,
    last_step=6,
    max_response_tokens=8,
    samples_per_prompt=2,
    learning_rate=1e-5,
    temperature=1.2,
    clip_low=0.2,
    clip_high=0.28,
    ends_when_stalled=None,
    truncated_factor=0.0,
)


def recipe(**changes: Any) -> Recipe:
    raw: dict[str, Any] = {
        "name": "small",
        "model": "somewhere",
        "data": {"sources": [{"task": "coin_flip"}]},
        "rollout": {"prompts_per_step": 8, "max_response_tokens": 8},
        "shaping": {"cosine": None},
        "stages": [{"steps": 6}],
    }
    return parse_recipe(raw | changes)


def group(
    number: int,
    scores: list[float],
    lengths: list[int],
    *,
    cut: tuple[int, ...] = (),
    task: str = "coin_flip",
) -> Group:
    """Prompt [number, 0]; tokens of response i are 100 * number + 10 * i + 0, 1, ..."""
    prompt = Prompt(
        prompt_id=f"reasoning_gym/{task}/{number}",
        domain="logic",
        task=task,
        messages=[{"role": "user", "content": f"question {number}"}],
        token_ids=[number, 0],
        grading={"kind": "reasoning_gym"},
    )
    samples = [
        Sample(
            index=i,
            token_ids=[100 * number + 10 * i + t for t in range(length)],
            engine_logprobs=[-0.5] * length,
            finish_reason="length" if i in cut else "stop",
            text=f"answer {i}",
            seed=i,
            weight_version=3,
            score=score,
            reason="graded",
        )
        for i, (score, length) in enumerate(zip(scores, lengths, strict=True))
    ]
    return Group(prompt, 0, samples)


def batch_of(groups: int, samples: int = 2) -> TrainingBatch:
    made = [group(i + 1, [1.0] + [0.0] * (samples - 1), [2] * samples) for i in range(groups)]
    count = groups * samples
    outcome = BatchAdvantages(
        torch.zeros(count), torch.ones(count, dtype=torch.bool), torch.zeros(count), 0
    )
    return training_batch(made, outcome, 1.0)
