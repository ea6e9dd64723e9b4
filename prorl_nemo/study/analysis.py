"""What the results of a study say: means over seeds, intervals, gains, what was solved and lost.

Pure. Seeds are the sample: an interval is Student's over runs, so it holds what another run would
give, not only other validation samples (Agarwal et al., arXiv 2108.13264, on why that matters).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_NORMAL95 = 1.95996
# Odds against chance at which a prompt counts as solved or lost beyond doubt.
_BEYOND_CHANCE = 0.01
# Runs that differ by less agree: figures are kept to five digits, and come in steps of a sample.
_AGREE = 1e-9
# Validations averaged where single ones would compare noise.
WINDOW = 4
CONTRADICTS = "contradicts the paper"


@dataclass(frozen=True)
class Estimate:
    """A mean over runs.

    Attributes:
        half_width: of the 95 % interval; None with one run.
        runs: how many.
    """

    mean: float
    half_width: float | None
    runs: int

    @property
    def agree(self) -> bool:
        """Several runs with one value: its interval has no width, and says nothing. Figures are
        counted in prompts and samples, so a few runs may meet by chance."""
        return self.half_width is not None and self.half_width < _AGREE

    @property
    def side(self) -> int:
        """Of zero that the interval lies on: 1 above, -1 below, 0 if it holds zero or says
        nothing."""
        if self.half_width is None or self.agree or abs(self.mean) <= self.half_width:
            return 0
        return 1 if self.mean > 0 else -1

    def within(self, low: float, high: float) -> tuple[float, float]:
        """The interval's ends, cut where the figure cannot be: a score is in [0, 1]."""
        half = self.half_width or 0.0
        return max(self.mean - half, low), min(self.mean + half, high)

    def __str__(self) -> str:
        spread = "" if self.half_width is None else f" ± {self.half_width:.3f}"
        return f"{self.mean:.3f}{spread}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval over runs. Raises ValueError without any."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, 1)
    half = _quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, half, len(values))


def intervals(shown: Sequence[Estimate]) -> str:
    """What a figure's title says of its intervals, if it has any."""
    has = any(found.half_width is not None for found in shown)
    return ", 95 % intervals over seeds" if has else ""


def _quantile(free: int) -> float:
    """Of Student's t; beyond the table by expansion in 1 / free, right to 0.003."""
    if free <= len(_T95):
        return _T95[free - 1]
    z = _NORMAL95
    return z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)


def difference(these: Mapping[int, float], those: Mapping[int, float]) -> Estimate | None:
    """Mean difference over the seeds both have, paired by seed; None if they share none."""
    shared = sorted(set(these) & set(those))
    return estimate([these[seed] - those[seed] for seed in shared]) if shared else None


def series(result: Result, key: str, source: str = "validation") -> list[tuple[int, float]]:
    """(step, value) of a figure where the run has it.

    Args:
        source: `validation`, or `train`, means over stretches of steps.
    """
    table = result[source]
    pairs = zip(table["step"], table.get(key, ()), strict=False)
    return [(step, value) for step, value in pairs if value is not None]


def window(result: Result, step: int, key: str) -> list[tuple[int, float]]:
    """The last `WINDOW` validations up to a step that have a figure; step 0 is never among later
    ones.

    Raises:
        ValueError: there is none.
    """
    rows = [(at, value) for at, value in series(result, key) if at <= step and (at or not step)]
    if not rows:
        raise ValueError(f"{result.get('run')}: no validation of {key} up to step {step}")
    return rows[-WINDOW:]


def around(result: Result, step: int, key: str) -> float:
    """Mean of a validation figure over the `window` up to a step."""
    return statistics.fmean(value for _, value in window(result, step, key))


def curve(
    results: Sequence[Result], key: str, source: str = "validation", last: int | None = None
) -> list[tuple[int, Estimate]]:
    """(step, mean over runs) where all runs have the figure, up to `last`."""
    by_step: dict[int, list[float]] = {}
    for result in results:
        for step, value in series(result, key, source):
            if last is None or step <= last:
                by_step.setdefault(step, []).append(value)
    return [
        (step, estimate(values))
        for step, values in sorted(by_step.items())
        if len(values) == len(results)
    ]


@dataclass(frozen=True)
class Crossing:
    """Prompts that a run made solvable or unsolvable, of those with n samples before and after.

    Attributes:
        solved, lost: none right before and some after, and the other way round. Chance is part of
            both: a prompt solved once in n is missed by n other samples a third of the time.
        solved_surely, lost_surely: so many after (or before) that chance would give as much less
            than once in a hundred.
        never: none right before or after.
        prompts: all there are.
    """

    solved: int
    lost: int
    solved_surely: int
    lost_surely: int
    never: int
    prompts: int


def crossing(before: Mapping[str, int], after: Mapping[str, int], samples: int) -> Crossing:
    """Compare counts of right samples, {prompt id: count}, of the prompts that both have."""
    sure = sure_count(samples)
    shared = [(before[prompt], after[prompt]) for prompt in before if prompt in after]
    return Crossing(
        solved=sum(not b and a > 0 for b, a in shared),
        lost=sum(b > 0 and not a for b, a in shared),
        solved_surely=sum(not b and a >= sure for b, a in shared),
        lost_surely=sum(b >= sure and not a for b, a in shared),
        never=sum(not b and not a for b, a in shared),
        prompts=len(shared),
    )


def sure_count(samples: int) -> int:
    """Fewest right ones of n samples that differ beyond chance from none of n others.

    Fisher's exact test, one-sided: given c right ones in all, the chance that all fell on one side
    is C(n, c) / C(2n, c). Of fewer than five samples no count does: one more than there are.
    """
    for count in range(1, samples + 1):
        if math.comb(samples, count) / math.comb(2 * samples, count) < _BEYOND_CHANCE:
            return count
    return samples + 1


def pass_at(counts: Iterable[int], samples: int, k: int) -> float:
    """Mean over prompts of pass@k, without bias (Chen et al., arXiv 2107.03374): the chance that k
    of a prompt's samples, drawn without putting back, hold a right one.

    Args:
        counts: right samples of each prompt.
        samples: of each prompt; at least k.
    """
    ways = math.comb(samples, k)
    return statistics.fmean(1 - math.comb(samples - right, k) / ways for right in counts)


def verdict(found: Estimate, expected: str | None) -> str:
    """What an interval says of the paper's claim: `lower` or `higher` than nothing."""
    if expected is None:
        return "the paper does not say"
    if found.half_width is None:
        return "one run: not decided"
    if found.agree:
        return "runs agree to the digit: not decided"
    if not found.side:
        return "not decided"
    return "as the paper" if (found.side > 0) == (expected == "higher") else CONTRADICTS


def by_task(counts: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Counts of each task's prompts; ids are `<source>/<task>/<slot>`."""
    found: dict[str, dict[str, int]] = {}
    for prompt, count in counts.items():
        found.setdefault(prompt.split("/")[1], {})[prompt] = count
    return found
