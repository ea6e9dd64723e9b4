"""The metrics row of a training step, and the samples kept for reading (docs/metrics.md)."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch

from prorl_nemo.algorithms.batch_advantages import BatchAdvantages
from prorl_nemo.algorithms.mismatch import (
    mismatch_by_position,
    mismatch_growth,
    mismatch_metrics,
)
from prorl_nemo.algorithms.policy_loss import importance_weights
from prorl_nemo.megatron.layout import ModelSpec, cost_model
from prorl_nemo.planning.hardware import GIB, GPUS
from prorl_nemo.recipe import Recipe
from prorl_nemo.rollout.filling import RolloutBatch, TaskTally
from prorl_nemo.schedule.stages import StageSettings
from prorl_nemo.training.batch import TrainingBatch
from prorl_nemo.training.host_memory import available_bytes
from prorl_nemo.training.repetition import is_repetitive

_GROUPS_KEPT_TO_READ = 4


def train_row(
    recipe: Recipe,
    step: int,
    stage: StageSettings,
    rollout: RolloutBatch,
    outcome: BatchAdvantages,
    batch: TrainingBatch,
    records: list[dict[str, float]],
) -> dict[str, Any]:
    """Everything about a step but its times."""
    samples = [sample for group in rollout.groups for sample in group.samples]
    lengths = [len(sample.token_ids) for sample in samples]
    decided = len(rollout.groups) + rollout.rejected
    row: dict[str, Any] = {
        "kind": "train",
        "step": step,
        "stage": stage.index,
        "stage_name": stage.name,
        "reward/raw_mean": _mean_score(rollout.tallies.values()),
        "reward/kept_mean": statistics.fmean(s.score or 0.0 for s in samples),
        "reward/shaped_mean": float(outcome.shaped.mean()),
        "rollout/kept_share": len(rollout.groups) / decided,
        "rollout/groups_kept": len(rollout.groups),
        "rollout/groups_rejected": rollout.rejected,
        "rollout/response_tokens_mean": statistics.fmean(lengths),
        "rollout/response_tokens_max": max(lengths),
        "rollout/response_limit": stage.max_response_tokens,
        "rollout/truncated_share": statistics.fmean(s.truncated for s in samples),
        "rollout/repetition_share": statistics.fmean(is_repetitive(s.token_ids) for s in samples),
        "rollout/generated_tokens": rollout.generated_tokens,
        "rollout/wasted_tokens": rollout.wasted_tokens,
        "rollout/trained_tokens": batch.response_tokens,
        "rollout/stale_share": statistics.fmean(batch.stale or [False]),
        "rollout/prompts_passed_over": rollout.passed_over,
        "shaping/dropped_groups": outcome.dropped_groups,
    }
    for task, tally in sorted(rollout.tallies.items()):
        row[f"reward/raw/{task}"] = tally.mean_score
        row[f"rollout/kept/{task}"] = tally.keep_rate
    for domain in sorted({tally.domain for tally in rollout.tallies.values()}):
        tallies = [tally for tally in rollout.tallies.values() if tally.domain == domain]
        kept = sum(tally.kept for tally in tallies)
        row[f"reward/domain/{domain}"] = _mean_score(tallies)
        row[f"rollout/kept_domain/{domain}"] = kept / max(
            1, kept + sum(tally.rejected for tally in tallies)
        )
    if records:
        row |= _update_figures(records) | _mismatch_figures(recipe, batch)
    return row


def _mean_score(tallies: Collection[TaskTally]) -> float:
    """Mean raw score of all decided groups: the kept ones alone are biased to one half."""
    return sum(t.score_sum for t in tallies) / max(1, sum(t.samples for t in tallies))


def _update_figures(records: list[dict[str, float]]) -> dict[str, float]:
    """Token-weighted means over the step's updates; skipped updates count in no mean."""
    done = [record for record in records if not record["skipped"]]
    skipped = {"policy/skipped_updates": float(len(records) - len(done))}
    if not done:
        return skipped
    tokens = sum(record["tokens"] for record in done)

    def mean(name: str) -> float:
        return sum(record[name] for record in done) / tokens

    return skipped | {
        "policy/loss": mean("loss_sum"),
        "policy/kl": mean("kl_sum"),
        "policy/entropy": mean("entropy_sum"),
        "policy/clip_share_low": mean("clipped_low_sum"),
        "policy/clip_share_high": mean("clipped_high_sum"),
        "policy/ratio_mean": mean("ratio_sum"),
        "policy/grad_norm": statistics.fmean(record["grad_norm"] for record in done),
    }


def _mismatch_figures(recipe: Recipe, batch: TrainingBatch) -> dict[str, float]:
    """Out of bounds are tokens of all samples. The rest is about the engine, so it is taken over
    the samples of the policy itself: one begun by an earlier policy differs for that reason."""
    old = torch.from_numpy(np.concatenate(batch.old_logprobs))
    engine = torch.from_numpy(np.concatenate(batch.engine_logprobs))
    lengths = torch.tensor([len(r) for r in batch.responses])
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    correction = recipe.algorithm.importance
    weights = importance_weights(
        old, engine, sequence, correction.method, correction.low, correction.high
    )
    share = {"mismatch/out_of_bounds_share": weights.out_of_bounds_share}
    fresh = ~torch.tensor(batch.stale or [False] * len(lengths))[sequence]
    if not bool(fresh.any()):
        return share
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])[fresh]
    old, engine = old[fresh], engine[fresh]
    figures = mismatch_metrics(old, engine)
    by_position = mismatch_by_position(old, engine, positions)
    return (
        {f"mismatch/{name}": value for name, value in figures.items()}
        | {f"mismatch/mean_abs/{stretch}": value for stretch, value in by_position.items()}
        | {"mismatch/growth": mismatch_growth(old, engine, positions)}
        | share
    )


def time_figures(
    times: dict[str, float], rollout: RolloutBatch, batch: TrainingBatch
) -> dict[str, float]:
    """Seconds of each phase, and the tokens per second they made."""
    names = ("generate", "logprobs", "reference", "train", "sync", "checkpoint", "step")
    row = {f"time/{name}": times.get(name, 0.0) for name in names}
    trained = sum(times.get(name, 0.0) for name in ("logprobs", "reference", "train"))
    if times.get("generate"):
        row["throughput/generated_tokens_per_second"] = rollout.generated_tokens / times["generate"]
    if trained:
        row["throughput/trained_tokens_per_second"] = batch.response_tokens / trained
    return row


def hardware_figures(
    spec: ModelSpec, batch: TrainingBatch, seconds: float, resources: list[tuple[str, int]]
) -> dict[str, float]:
    """What the ranks computed and held during the updates.

    Args:
        seconds: of the updates.
        resources: device and peak bytes of each rank.
    """
    row = {
        "memory/trainer_peak_gib": max(peak for _, peak in resources) / GIB,
        "memory/host_free_gib": available_bytes() / GIB,
    }
    if seconds > 0 and batch.groups:
        per_rank = model_flops(spec, batch) / seconds / len(resources)
        row["throughput/train_tflops"] = per_rank / 1e12
        peak = peak_flops(resources[0][0])
        if peak is not None:
            row["throughput/mfu"] = per_rank / peak
    return row


def model_flops(spec: ModelSpec, batch: TrainingBatch) -> float:
    """FLOPs of forward and backward over a batch, each sample behind a prompt of its own.

    The usual count of model FLOPs utilisation (Chowdhery et al., arXiv 2204.02311, appendix B):
    nothing is counted that is computed again, and nothing is saved by sharing prompts.
    """
    cost = cost_model(spec)
    total = 0.0
    for prompt, samples in zip(batch.prompts, batch.groups, strict=True):
        for sample in samples:
            response = len(batch.responses[sample])
            tokens = len(prompt) + response
            # The cost model counts the head once more than the model needs it.
            total += cost.token * tokens + 0.75 * cost.target * response
            total += cost.pair * tokens**2 / 2
    return total


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name it gives itself; None where it is not known."""
    named = [name for name in GPUS if name in device.lower()]
    # The longest: a GB200 is no B200.
    return GPUS[max(named, key=len)].bf16_flops if named else None


def sample_rows(
    step: int, rollout: RolloutBatch, outcome: BatchAdvantages
) -> Iterator[dict[str, Any]]:
    """The first groups of a step, whole, as records a person can read."""
    index = 0
    for group in rollout.groups[:_GROUPS_KEPT_TO_READ]:
        for sample in group.samples:
            yield {
                "step": step,
                "prompt_id": group.prompt.prompt_id,
                "domain": group.prompt.domain,
                "task": group.prompt.task,
                "messages": group.prompt.messages,
                "response": sample.text,
                "score": sample.score,
                "shaped": float(outcome.shaped[index]),
                "advantage": float(outcome.advantages[index]),
                "tokens": len(sample.token_ids),
                "finish_reason": sample.finish_reason,
                "reason": sample.reason,
            }
            index += 1
