"""Figures of one benchmark: avg@n, its two standard errors, unbiased pass@k, outcome shares.

Sources: pass@k from Chen et al. 2021 (arXiv 2107.03374, eq. 1); the standard errors from Miller
2024 (arXiv 2411.00640, sections 2 and 3). Sums are exact (`math.fsum`), so that the order in which
items were finished changes no digit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Average:
    """avg@n of a benchmark, in the unit of the scores.

    Attributes:
        mean: over items of the mean over samples.
        error_items: standard error when the items are a draw from all items of this kind; it
            holds the noise of sampling too. None with one item.
        error_samples: standard error when the items are given and only the sampling is repeated:
            what two runs of one model differ by. None with one sample per item.
        items, samples: how many, and samples of each.
    """

    mean: float
    error_items: float | None
    error_samples: float | None
    items: int
    samples: int


def score_matrix(scores: Sequence[Sequence[float]]) -> Matrix:
    """Scores as an array [items, samples].

    Raises:
        ValueError: no items or samples, items with different numbers of samples (a mean over them
            would weigh items by chance), or a score outside [0, 1].
    """
    counts = {len(row) for row in scores}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"every item needs the same number of samples, found {sorted(counts)}")
    matrix = np.asarray(scores, dtype=np.float64)
    # Written so that a NaN fails.
    if not bool(((matrix >= 0) & (matrix <= 1)).all()):
        raise ValueError("scores must be numbers in [0, 1]")
    return matrix


def item_means(scores: Sequence[Sequence[float]]) -> list[float]:
    """Mean score of each item over its samples, [items]."""
    return [math.fsum(row) / len(row) for row in score_matrix(scores).tolist()]


def average(scores: Sequence[Sequence[float]]) -> Average:
    """avg@n of scores [items, samples]. Raises ValueError as `score_matrix` does."""
    matrix = score_matrix(scores)
    items, samples = matrix.shape
    means = item_means(scores)
    mean = math.fsum(means) / items
    error_items = error_samples = None
    if items > 1:
        error_items = math.sqrt(_variance(means) / items)
    if samples > 1:
        within = math.fsum(_variance(row) for row in matrix.tolist()) / items
        error_samples = math.sqrt(within / samples / items)
    return Average(mean, error_items, error_samples, items, samples)


def group_means(groups: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Mean of the values of each group, by its name, in the order of names.

    Args:
        groups: the group of each value, [values].
    """
    by_group: dict[str, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        by_group.setdefault(group, []).append(value)
    return {group: math.fsum(found) / len(found) for group, found in sorted(by_group.items())}


def pass_at_k(scores: Sequence[Sequence[float]]) -> Matrix:
    """Unbiased pass@k of each item for k = 1 ... n, [items, n]. Their mean over items is the curve.

    The chance that none of k of the n samples is right is C(n-c, k) / C(n, k) with c right ones:
    here the running product of (n-c-j) / (n-j), which neither overflows nor cancels.

    Args:
        scores: [items, n]; a sample is right when its score is 1, so partial credit is none.
    """
    right = score_matrix(scores) == 1.0
    n = right.shape[1]
    drawn = np.arange(n)
    wrong = n - right.sum(axis=1, keepdims=True)
    all_wrong = np.cumprod(np.clip(wrong - drawn, 0, None) / (n - drawn), axis=1)
    return 1.0 - all_wrong


def pass_curve(scores: Sequence[Sequence[float]]) -> list[float]:
    """pass@k of the benchmark for k = 1 ... n: the mean over items."""
    columns = pass_at_k(scores).T.tolist()
    return [math.fsum(column) / len(column) for column in columns]


@dataclass(frozen=True)
class Outcome:
    """What became of one sample.

    Attributes:
        score: in [0, 1].
        reason: the grader's (`Verdict.reason`).
        tokens: length of the response.
        truncated: the response limit cut it.
    """

    score: float
    reason: str
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class OutcomeShares:
    """Shares of the samples, and their mean length. The first four add up to 1.

    Attributes:
        right: score 1.
        partial: a score between 0 and 1.
        no_answer: score 0 because the grader found nothing to grade, or refused its form: a
            failure of format, kept apart from wrong answers. So is a prompt that was not asked.
        wrong: an answer, with score 0.
        truncated: cut by the response limit, whatever the score.
        no_answer_truncated: of all samples, those with no answer *and* cut: a longer limit,
            not a better format, would help them.
        tokens: mean response length in tokens.
    """

    right: float
    partial: float
    no_answer: float
    wrong: float
    truncated: float
    no_answer_truncated: float
    tokens: float


NOT_ASKED = "not asked"
"""First words of the reason of a sample whose prompt could not be given to the model."""
# The part of a verdict's reason before its first colon, where nothing was graded.
_NOT_GRADED = {"no answer", "refused", NOT_ASKED}


def outcome_shares(outcomes: Sequence[Outcome]) -> OutcomeShares:
    """Raises ValueError without samples."""
    if not outcomes:
        raise ValueError("no samples")
    counts: dict[str, int] = dict.fromkeys(OutcomeShares.__dataclass_fields__, 0)
    for outcome in outcomes:
        kind = kind_of(outcome.score, outcome.reason)
        counts[kind] += 1
        counts["truncated"] += outcome.truncated
        counts["no_answer_truncated"] += outcome.truncated and kind == "no_answer"
        counts["tokens"] += outcome.tokens
    shares: Mapping[str, float] = {key: count / len(outcomes) for key, count in counts.items()}
    return OutcomeShares(**shares)


def kind_of(score: float, reason: str) -> str:
    """What became of a sample, in one word: right, partial, no_answer or wrong."""
    if score > 0:
        return "right" if score == 1.0 else "partial"
    return "no_answer" if reason.split(":")[0] in _NOT_GRADED else "wrong"


def _variance(values: Sequence[float]) -> float:
    """Unbiased variance of at least two values."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
