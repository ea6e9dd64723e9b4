"""How likely a group is to carry signal, given what is known of it so far.

The sampler must start enough prompts to fill the batch and not many more. A group that shows two
different scores is certain to be kept; one whose first k scores are all equal is the less likely
to be kept the larger k is. Our choice: count what became of such groups, and forget slowly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prorl_nemo.algorithms.group_filter import TOLERANCE

PRIOR_KEEP_RATE = 0.5
PRIOR_WEIGHT = 4.0
"""Groups that the prior counts for: a handful, so that the first batch already corrects it."""

FORGET = 0.8
"""Share of the evidence that survives a batch: the policy changes, slowly."""


def is_certain(scores: Sequence[float], group_size: int) -> bool:
    """Whether a group will be kept whatever its other scores turn out to be.

    Two scores at a distance d leave a population standard deviation of at least
    d / sqrt(2 n), reached when all others lie half-way between them.
    """
    if len(scores) < 2:
        return False
    return (max(scores) - min(scores)) / math.sqrt(2 * group_size) > TOLERANCE


class KeepRate:
    """Estimates P(kept | the first k scores were equal), k = 0 .. group_size."""

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self._kept = [0.0] * (group_size + 1)
        self._seen = [0.0] * (group_size + 1)
        self._chances: list[float] | None = None

    def observe(self, scores: Sequence[float], kept: bool) -> None:
        """Learn from a decided group; `scores` in the order they became known."""
        for known in range(len(scores) + 1):
            if is_certain(scores[:known], self.group_size):
                break
            self._seen[known] += 1
            self._kept[known] += kept
        self._chances = None

    def chance(self, known: int) -> float:
        """Probability that a group with `known` scores, all equal, will be kept."""
        if self._chances is None:
            self._chances = []
            rate = PRIOR_KEEP_RATE
            for kept, seen in zip(self._kept, self._seen, strict=True):
                # Each count leans on the one before it while it is small.
                rate = (kept + PRIOR_WEIGHT * rate) / (seen + PRIOR_WEIGHT)
                self._chances.append(rate)
            self._chances[-1] = 0.0
        return self._chances[known]

    def state_dict(self) -> dict[str, Any]:
        """The evidence, JSON-able."""
        return {"group_size": self.group_size, "kept": list(self._kept), "seen": list(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.group_size = state["group_size"]
        self._kept, self._seen = list(state["kept"]), list(state["seen"])
        self._chances = None

    def forget(self) -> None:
        """Age the evidence by one batch."""
        self._kept = [FORGET * count for count in self._kept]
        self._seen = [FORGET * count for count in self._seen]
        self._chances = None
