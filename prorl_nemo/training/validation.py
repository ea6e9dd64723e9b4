"""Validation figures: mean score over prompts, standard errors, domains and tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from prorl_nemo.records import Group
from prorl_nemo.training.repetition import is_repetitive


def validation_row(
    groups: Sequence[Group], never_trained: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The metrics row of a validation (without step and time).

    The score of a prompt is the mean over its samples (avg@n); prompts, not samples, are what
    the standard error counts, since samples of one prompt are not independent. A prompt passes
    (pass@n) when one of its samples has the full score.

    Args:
        never_trained: tasks that are only validated. They have figures of their own, and no part
            in the others, by which runs decide on resets and best checkpoints.
    """
    trained = [group for group in groups if group.prompt.task not in never_trained]
    others = [group for group in groups if group.prompt.task in never_trained]
    if not trained:
        raise ValueError("validation gave no scores: every held-out prompt was dropped")
    means = [statistics.fmean(group.scores) for group in trained]
    samples = [sample for group in trained for sample in group.samples]
    row: dict[str, Any] = {
        "kind": "validation",
        "validation/mean": statistics.fmean(means),
        "validation/stderr": standard_error(means),
        "validation/pass": statistics.fmean(map(_passes, trained)),
        "validation/samples": len(samples),
        "validation/truncated_share": statistics.fmean(s.truncated for s in samples),
        "validation/repetition_share": statistics.fmean(
            is_repetitive(s.token_ids) for s in samples
        ),
        "validation/response_tokens_mean": statistics.fmean(len(s.token_ids) for s in samples),
    }
    if others:
        means = [statistics.fmean(group.scores) for group in others]
        row["validation/never_trained/mean"] = statistics.fmean(means)
        row["validation/never_trained/stderr"] = standard_error(means)
        row["validation/never_trained/pass"] = statistics.fmean(map(_passes, others))
    by_domain: dict[str, list[float]] = {}
    for group in trained:
        by_domain.setdefault(group.prompt.domain, []).append(statistics.fmean(group.scores))
    for domain, scores in sorted(by_domain.items()):
        row[f"validation/domain/{domain}"] = statistics.fmean(scores)
        row[f"validation/domain_stderr/{domain}"] = standard_error(scores)
    by_task: dict[str, list[Group]] = {}
    for group in groups:
        by_task.setdefault(group.prompt.task, []).append(group)
    for task, of_task in sorted(by_task.items()):
        row[f"validation/{task}"] = statistics.fmean(statistics.fmean(g.scores) for g in of_task)
        row[f"validation/pass/{task}"] = statistics.fmean(map(_passes, of_task))
    return row


def _passes(group: Group) -> bool:
    """Whether a sample has the full score; partial credit is no pass."""
    return max(group.scores) == 1.0


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 for a single one."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) / math.sqrt(len(values))
