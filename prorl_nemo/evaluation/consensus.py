"""cons@k: is the answer that most of k samples agree on the right one? Its exact expectation.

Majority voting is Wang et al. 2022 (arXiv 2203.11171). Drawing k of the n samples once would add
noise of its own; here the expectation over all subsets of size k is computed, by counting them.
Our choices: samples without an answer do not vote, and a tie is split evenly among the tied.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Beyond, binomial coefficients leave the range of a double.
MAX_SAMPLES = 1000


def cons_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Chance that a majority vote of k samples, drawn without replacement, is right.

    Args:
        answers: the extracted answer of each sample of one item, [n]; None where there is none.
            Equal texts are one candidate; two spellings of a value are two.
        right: whether the grader accepts each, [n]; equal answers have equal verdicts.
        k: votes, 1 ... n.

    Raises:
        ValueError: k out of range, over 1,000 samples, lengths that differ, or one answer graded
            in two ways.
    """
    n = len(answers)
    if len(right) != n or not 1 <= k <= n or n > MAX_SAMPLES:
        raise ValueError(
            f"cons@k: {n} answers and {len(right)} verdicts for k = {k}; "
            f"k must be 1 to n, n at most {MAX_SAMPLES}"
        )
    verdicts: dict[str, bool] = {}
    for answer, verdict in zip(answers, right, strict=True):
        if answer is not None and verdicts.setdefault(answer, verdict) != verdict:
            raise ValueError(f"cons@k: {answer[:80]!r} is graded both right and wrong")
    counts = Counter(answer for answer in answers if answer is not None)
    silent = n - counts.total()
    favourable = 0.0
    for answer in (answer for answer, verdict in verdicts.items() if verdict):
        # Sorted, because a sum's last digits depend on its order.
        others = sorted(count for other, count in counts.items() if other != answer)
        for votes in range(1, min(counts[answer], k) + 1):
            wins = math.comb(counts[answer], votes) * _wins(others, silent, votes, k - votes)
            favourable += wins
    return favourable / math.comb(n, k)


def _wins(others: list[int], silent: int, votes: int, rest: int) -> float:
    """Ways to draw `rest` samples so that no other candidate has more than `votes`; a way in
    which t candidates tie with ours counts 1 / (t + 1)."""
    # ways[r, t]: to draw r samples with t ties so far.
    ways: npt.NDArray[np.float64] = np.zeros((rest + 1, rest // votes + 1))
    for drawn in range(min(silent, rest) + 1):
        ways[drawn, 0] = math.comb(silent, drawn)
    for count in others:
        before = ways.copy()  # Nobody of this candidate is drawn.
        for drawn in range(1, min(count, votes, rest) + 1):
            more = math.comb(count, drawn) * before[: rest + 1 - drawn]
            if drawn < votes:
                ways[drawn:] += more
            else:
                ways[drawn:, 1:] += more[:, :-1]
    return float(np.sum(ways[rest] / (np.arange(ways.shape[1]) + 1)))
