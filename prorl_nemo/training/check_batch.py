"""The batch that `prorl check` computes on, the same figures from transformers, and the limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prorl_nemo.algorithms.batch_advantages import BatchAdvantages
from prorl_nemo.records import Group
from prorl_nemo.training.batch import TrainingBatch
from prorl_nemo.training.rollout_batch import training_batch

# Mean |log-prob difference| in nats per token. bf16 has 8 bits of mantissa and two independent
# implementations round differently in every layer; a wrong temperature, a stale head or a rope
# fault gives 0.1 to 5. fp32 implementations agree to 1e-5 or better. FP8 has 4 bits of mantissa.
MISMATCH_LIMIT = {"fp8": 0.15, "bf16": 0.03, "fp32": 1e-3}
# Relative difference of the gradient norm between layouts. In bf16 another split rounds
# activations elsewhere; in fp32 only the order of sums differs. FP8 is compared with bf16.
GRADIENT_LIMIT = {"fp8": 0.1, "bf16": 0.02, "fp32": 1e-4}


def made_up_batch(groups: Sequence[Group], temperature: float) -> TrainingBatch:
    """All groups with alternating advantages, so that every token has a gradient."""
    count = sum(len(group.samples) for group in groups)
    advantages = torch.where(torch.arange(count) % 2 == 1, 1.0, -0.5)
    everything = torch.ones(count, dtype=torch.bool)
    outcome = BatchAdvantages(advantages.double(), everything, advantages, dropped_groups=0)
    return training_batch(groups, outcome, temperature)


def first_groups(batch: TrainingBatch, groups: int) -> TrainingBatch:
    """The first groups of a batch whose samples are listed group by group."""
    samples = sum(len(group) for group in batch.groups[:groups])
    return TrainingBatch(
        batch.prompts[:groups],
        batch.groups[:groups],
        batch.responses[:samples],
        batch.engine_logprobs[:samples],
        batch.advantages[:samples],
        batch.temperature,
        batch.old_logprobs[:samples],
        batch.reference_logprobs[:samples],
    )


@torch.no_grad()
def transformers_logprobs(
    folder: Path, batch: TrainingBatch, device: str = "cpu"
) -> list[NDArray[np.float32]]:
    """Log-probs [length] of each sample by transformers in fp32, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device).eval()
    found: list[NDArray[np.float32]] = []
    for prompt, samples in zip(batch.prompts, batch.groups, strict=True):
        for sample in samples:
            response = torch.from_numpy(batch.responses[sample]).to(device)
            ids = torch.cat((torch.tensor(prompt, device=device), response))[None]
            logits = model(ids).logits[0, len(prompt) - 1 : -1] / batch.temperature
            picked = torch.log_softmax(logits, dim=-1).gather(1, response[:, None])
            found.append(picked.squeeze(1).cpu().numpy())
    return found


def token_differences(a: Sequence[NDArray[Any]], b: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """|a - b| of every token, [tokens]."""
    return np.abs(np.concatenate(a).astype(np.float64) - np.concatenate(b).astype(np.float64))


def mean_difference(a: Sequence[NDArray[Any]], b: Sequence[NDArray[Any]]) -> float:
    """Mean |a - b| over all tokens, in nats per token for log-probs."""
    return float(token_differences(a, b).mean())
