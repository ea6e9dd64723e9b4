"""Bootstrap intervals over items, and the paired comparison of two models on the same items.

Sources: Efron and Tibshirani 1993 (percentile interval); the sign-flip permutation test, Fisher
1935, for which two models of equal quality make the sign of each item's difference a fair coin.
Both are seeded, and values are sorted first, so that the order of items changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.estimators import item_means

RESAMPLES = 10_000
_CHUNK = 1 << 22  # numbers drawn at a time: 32 MiB
# With this many differences that are not zero all sign patterns are tried: 65,536.
_EXACT = 16


@dataclass(frozen=True)
class Interval:
    """Bounds that hold the true mean with the given confidence."""

    low: float
    high: float
    level: float


def bootstrap_interval(
    values: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a mean.

    Args:
        values: one per item (`item_means`, or a column of `pass_at_k`), [items].

    Raises:
        ValueError: no values, one that is not finite, or a level outside (0, 1).
    """
    ordered = _sorted(values)
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level {level} must be in (0, 1), resamples {resamples} at least 1")
    rng = np.random.default_rng(seed)
    size = len(ordered)
    means: list[npt.NDArray[np.float64]] = []
    for rows in _chunks(resamples, size):
        means.append(ordered[rng.integers(size, size=(rows, size))].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


@dataclass(frozen=True)
class Paired:
    """Model A against model B on the same items.

    Attributes:
        difference: mean of A less mean of B.
        error: standard error of the difference over items; None with one item. The difficulty of
            the items, which both models share, is not in it.
        interval: bootstrap interval of the difference.
        p_value: two-sided, of the sign-flip test: how often chance alone gives a difference at
            least this large.
        items: how many.
    """

    difference: float
    error: float | None
    interval: Interval
    p_value: float
    items: int


def paired_test(
    a: Mapping[str, Sequence[float]],
    b: Mapping[str, Sequence[float]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Paired:
    """Compare two models by their scores, item id -> [samples]. The numbers of samples of the two
    models may differ.

    Raises:
        UserError: they were not evaluated on the same items.
        ValueError: as `estimators.score_matrix`.
    """
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise UserError(
            f"a paired comparison needs the same items; {len(odd)} are in one evaluation only, "
            f"{odd[0]} for one"
        )
    ids = sorted(a)
    means_a, means_b = (item_means([scores[i] for i in ids]) for scores in (a, b))
    differences = _sorted([x - y for x, y in zip(means_a, means_b, strict=True)])
    size = len(differences)
    mean = math.fsum(differences) / size
    error = float(differences.std(ddof=1)) / math.sqrt(size) if size > 1 else None
    interval = bootstrap_interval(differences.tolist(), resamples=resamples, seed=seed)
    return Paired(mean, error, interval, _sign_flip(differences, resamples, seed), size)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for having looked at several benchmarks (Holm 1979): below 0.05 anywhere
    means that all of them together go wrong with a chance of 5 % at most."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _sign_flip(differences: npt.NDArray[np.float64], resamples: int, seed: int) -> float:
    """Two-sided p-value; exact for few differences, else with the observed one counted in."""
    moved = differences[differences != 0]
    size = len(moved)
    # A pattern that gives the same sum in another order must count as equal.
    observed = abs(math.fsum(moved)) * (1 - 1e-9)
    if size <= _EXACT:
        patterns = np.arange(1 << size)[:, None] >> np.arange(size) & 1
        return float((np.abs((1 - 2 * patterns) @ moved) >= observed).mean())
    rng = np.random.default_rng(seed)
    extreme = 0
    for rows in _chunks(resamples, size):
        signs = 1 - 2 * rng.integers(2, size=(rows, size))
        extreme += int((np.abs(signs @ moved) >= observed).sum())
    return (extreme + 1) / (resamples + 1)


def _sorted(values: Sequence[float]) -> npt.NDArray[np.float64]:
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if not len(ordered) or not bool(np.isfinite(ordered).all()):
        raise ValueError("values must be finite numbers, at least one")
    return ordered


def _chunks(total: int, width: int) -> list[int]:
    """Numbers of rows, `total` in all, none of more than `_CHUNK` cells (or one row)."""
    rows = max(1, _CHUNK // max(1, width))
    return [min(rows, total - start) for start in range(0, total, rows)]
