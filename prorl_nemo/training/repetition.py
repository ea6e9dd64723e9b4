"""Whether a response repeats itself, by n-grams of tokens.

Repetition is how long responses collapse (ProRL, arXiv 2505.24864, run 3; Yeo et al.,
arXiv 2502.03373, punish repeated n-grams). Threshold and n are our choice: ordinary reasoning
repeats few runs of twenty tokens, a loop repeats nearly all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NGRAM = 20
THRESHOLD = 0.5
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def repeated_share(token_ids: Sequence[int], n: int = NGRAM) -> float:
    """Share of n-grams that occurred earlier in the response; 0 for fewer than n tokens."""
    tokens = np.asarray(token_ids, dtype=np.uint64)
    if len(tokens) < n:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(tokens, n)
    # One 64-bit hash an n-gram (a polynomial modulo 2**64): comparing the n-grams themselves takes
    # ten times as long, and two of 10**4 collide once in 10**11 responses.
    hashes = windows @ _MULTIPLIER ** np.arange(n, dtype=np.uint64)
    return 1.0 - len(np.unique(hashes)) / len(windows)


def is_repetitive(token_ids: Sequence[int]) -> bool:
    """Whether more than half of the response's n-grams have been there before."""
    return repeated_share(token_ids) > THRESHOLD
