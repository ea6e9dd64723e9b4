"""Validation figures: mean score over prompts, standard errors, domains and tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from prorl_nemo.records import Group
from prorl_nemo.training.repetition import is_repetitive


def validation_row(groups: Sequence[Group]) -> dict[str, Any]:
    """The metrics row of a validation (without step and time).

    The score of a prompt is the mean over its samples (avg@n); prompts, not samples, are what
    the standard error counts, since samples of one prompt are not independent.
    """
    by_task: dict[str, list[float]] = {}
    for group in groups:
        by_task.setdefault(group.prompt.task, []).append(statistics.fmean(group.scores))
    means = [mean for task in by_task.values() for mean in task]
    if not means:
        raise ValueError("validation gave no scores: every held-out prompt was dropped")
    samples = [sample for group in groups for sample in group.samples]
    row: dict[str, Any] = {
        "kind": "validation",
        "validation/mean": statistics.fmean(means),
        "validation/stderr": standard_error(means),
        "validation/samples": len(samples),
        "validation/truncated_share": statistics.fmean(s.truncated for s in samples),
        "validation/repetition_share": statistics.fmean(
            is_repetitive(s.token_ids) for s in samples
        ),
        "validation/response_tokens_mean": statistics.fmean(len(s.token_ids) for s in samples),
    }
    by_domain: dict[str, list[float]] = {}
    for group in groups:
        by_domain.setdefault(group.prompt.domain, []).append(statistics.fmean(group.scores))
    for domain, scores in sorted(by_domain.items()):
        row[f"validation/domain/{domain}"] = statistics.fmean(scores)
        row[f"validation/domain_stderr/{domain}"] = standard_error(scores)
    for task, scores in sorted(by_task.items()):
        row[f"validation/{task}"] = statistics.fmean(scores)
    return row


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 for a single one."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) / math.sqrt(len(values))
