"""Figures of an evaluation, from its graded samples: one `BenchmarkResult` each.

All of them come from the same samples: strict and continuous scores, pass@k, votes, outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.consensus import MAX_SAMPLES, cons_at_k
from prorl_nemo.evaluation.estimators import (
    NOT_ASKED,
    Average,
    Outcome,
    OutcomeShares,
    average,
    group_means,
    item_means,
    outcome_shares,
    pass_at_k,
    pass_curve,
)
from prorl_nemo.evaluation.reported import Comparison, Reported, compare
from prorl_nemo.evaluation.resampling import Interval, Paired, bootstrap_interval, holm, paired_test
from prorl_nemo.evaluation.suite import Part, Suite

# Graders whose answers are short texts that can be voted on.
_VOTERS = {"math", "multiple_choice", "reasoning_gym"}
# Figures of a verdict that are reported beside the score: IFEval's other readings.
_EXTRA = ("prompt_strict", "prompt_loose", "instruction_loose")


@dataclass(frozen=True)
class Graded:
    """What the figures need of one sample.

    Attributes:
        score: the grader's, in [0, 1].
        answer: what was extracted; None where there was nothing, or nothing to vote on.
        extra: other readings of the same verdict.
    """

    score: float
    reason: str
    tokens: int
    truncated: bool
    answer: str | None = None
    extra: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Graded:
        """Of a row of `samples.jsonl`."""
        extra = {name: row["parts"][name] for name in _EXTRA if name in row["parts"]}
        return cls(
            row["score"], row["reason"], row["tokens"], row["truncated"], row["answer"], extra
        )


Scores = dict[str, list[float]]
"""Item id -> score of each sample, under the protocol's reading."""


@dataclass(frozen=True)
class BenchmarkResult:
    """Figures of one benchmark; scores and shares in [0, 1].

    Attributes:
        metric: avg (strict scores) or reward (continuous ones).
        interval: of the average, over items: bootstrap, and with every item at 0, or every one at
            1, the exact binomial bound, since resampling equal values would claim certainty.
        pass_curve: pass@k for k = 1 ... n.
        pass_interval: of pass@n, likewise.
        votes: cons@k for k = 1, 2, 4 ... n; None where answers cannot be voted on.
        groups: mean score by task, where there are several.
        task_mean, category_mean: unweighted means over tasks, and over Reasoning Gym's categories
            of the means over their tasks. Both are reported, and differ by points.
        extra: other readings of the same verdicts (IFEval), as means over samples.
        not_asked: samples whose prompt the model cannot be given; they count as 0.
        notes: what a reader must know: subsets, items that are not pinned, votes that failed.
        comparisons: with published numbers.
    """

    name: str
    title: str
    domain: str
    metric: str
    average: Average
    interval: Interval
    pass_curve: list[float]
    pass_interval: Interval
    votes: dict[int, float] | None
    shares: OutcomeShares
    groups: dict[str, float]
    task_mean: float | None
    category_mean: float | None
    extra: dict[str, float]
    not_asked: int
    notes: list[str]
    doubts: list[str]
    comparisons: list[Comparison]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_samples(suite: Suite, rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Graded]]:
    """Graded samples by item, in the order of their index.

    Rows of other items, or beyond the suite's number of samples, are left out: they may belong to
    a protocol that asks for more.

    Raises:
        UserError: a sample is missing.
    """
    wanted = {item.item_id: part.samples for part in suite.parts for item in part.items.items}
    found: dict[str, dict[int, Graded]] = {item: {} for item in wanted}
    for row in rows:
        if row["sample"] < wanted.get(row["item"], 0):
            found[row["item"]][row["sample"]] = Graded.from_row(row)
    missing = sum(count - len(found[item]) for item, count in wanted.items())
    if missing:
        raise UserError(
            f"{missing} of {suite.total} samples are missing; finish the evaluation with the "
            "command that began it"
        )
    return {item: [found[item][i] for i in range(count)] for item, count in wanted.items()}


def scores_of(part: Part, samples: Mapping[str, Sequence[Graded]]) -> Scores:
    """Scores of a benchmark under its protocol."""
    return {
        item.item_id: [_read(sample.score, part.strict) for sample in samples[item.item_id]]
        for item in part.items.items
    }


def benchmark_result(
    part: Part,
    samples: Mapping[str, Sequence[Graded]],
    label: str,
    reported: Iterable[Reported] = (),
    model: str = "",
) -> BenchmarkResult:
    """All figures of one benchmark.

    Args:
        samples: of every item of the suite.
        label: the protocol's, as the reported tables name it.
        reported: published numbers to set beside; of other benchmarks are left out.
        model: ours, as the reported tables name it.
    """
    benchmark, items = part.benchmark, part.items
    rows = [samples[item.item_id] for item in items.items]
    scores = list(scores_of(part, samples).values())
    raw = [[sample.score for sample in row] for row in rows]
    flat = [sample for row in rows for sample in row]
    ours, means = average(scores), item_means(scores)
    votes, notes = _votes(benchmark.grader, rows, part.samples)
    if not items.whole:
        notes.append(f"{len(items.items)} of {items.total} items")
    if not items.pinned and items.whole:
        notes.append("items not pinned: the definition has no hash")
    not_asked = sum(sample.reason.startswith(NOT_ASKED) for sample in flat)
    if not_asked:
        notes.append(f"{not_asked} samples could not be asked, and count as 0")
    by_task = group_means([item.group for item in items.items], means)
    if len(by_task) == 1:
        by_task = {}
    beside = [
        _beside(ours, published, label, part, model)
        for published in reported
        if published.benchmark == benchmark.name
    ]
    return BenchmarkResult(
        name=benchmark.name,
        title=benchmark.title,
        domain=benchmark.domain,
        metric=part.metric,
        average=ours,
        interval=_interval(means),
        pass_curve=pass_curve(raw),
        pass_interval=_interval(pass_at_k(raw)[:, -1].tolist()),
        votes=votes,
        shares=outcome_shares([Outcome(s.score, s.reason, s.tokens, s.truncated) for s in flat]),
        groups=by_task,
        task_mean=_mean(by_task),
        category_mean=_mean(
            group_means([category_of(task) for task in by_task], [*by_task.values()])
        ),
        extra=_extra(flat),
        not_asked=not_asked,
        notes=notes,
        doubts=list(benchmark.doubts),
        comparisons=beside,
    )


@dataclass(frozen=True)
class ModelsCompared:
    """Model A against model B on one benchmark; `adjusted_p` for all benchmarks looked at."""

    name: str
    title: str
    metric: str
    mean_a: float
    mean_b: float
    paired: Paired
    adjusted_p: float


def compare_models(
    a: Suite,
    samples_a: Mapping[str, Sequence[Graded]],
    b: Suite,
    samples_b: Mapping[str, Sequence[Graded]],
) -> list[ModelsCompared]:
    """The paired test on every benchmark that both evaluations hold.

    Raises:
        UserError: none in common, other items, or scores read in two ways.
    """
    parts_b = {part.benchmark.name: part for part in b.parts}
    found: list[tuple[Part, float, float, Paired]] = []
    for part in a.parts:
        other = parts_b.get(part.benchmark.name)
        if other is None:
            continue
        if part.strict != other.strict:
            raise UserError(
                f"{part.benchmark.name}: one evaluation reads strict scores and the other "
                "continuous ones; grade one again with --regrade and the other's --protocol"
            )
        ours, theirs = scores_of(part, samples_a), scores_of(other, samples_b)
        paired = paired_test(ours, theirs)
        means = [average(list(scores.values())).mean for scores in (ours, theirs)]
        found.append((part, means[0], means[1], paired))
    if not found:
        raise UserError("--compare: the two evaluations have no benchmark in common")
    adjusted = holm({part.benchmark.name: paired.p_value for part, _, _, paired in found})
    return [
        ModelsCompared(
            part.benchmark.name, part.benchmark.title, part.metric, mean_a, mean_b, paired,
            adjusted[part.benchmark.name],
        )
        for part, mean_a, mean_b, paired in found
    ]  # fmt: skip


def _read(score: float, strict: bool) -> float:
    return float(score == 1.0) if strict else score


def _interval(means: Sequence[float]) -> Interval:
    """95 % interval of the mean over items. With every item at 0 (or 1) nothing was seen to vary:
    the bound is that of Clopper and Pearson (1934), 1 - (alpha / 2) ** (1 / items)."""
    if set(means) not in ({0.0}, {1.0}):
        return bootstrap_interval(means)
    unseen = 1 - 0.025 ** (1 / len(means))
    low, high = (0.0, unseen) if means[0] == 0 else (1 - unseen, 1.0)
    return Interval(low, high, 0.95)


def _votes(
    grader: str, rows: Sequence[Sequence[Graded]], n: int
) -> tuple[dict[int, float] | None, list[str]]:
    if grader not in _VOTERS or n > MAX_SAMPLES:
        return None, []
    counts = sorted({1 << power for power in range(n.bit_length()) if 1 << power <= n} | {n})
    try:
        return {
            k: math.fsum(
                cons_at_k([s.answer for s in row], [s.score == 1.0 for s in row], k) for row in rows
            ) / len(rows)
            for k in counts
        }, []  # fmt: skip
    except ValueError as error:
        # A time limit that hit one of two equal answers, say. The other figures stand.
        return None, [f"no votes: {error}"]


def _mean(by_group: Mapping[str, float]) -> float | None:
    """Unweighted; None without groups."""
    return math.fsum(by_group.values()) / len(by_group) if by_group else None


@cache
def category_of(task: str) -> str:
    """The package of Reasoning Gym that a task is in: algebra, games, logic ..."""
    from reasoning_gym.factory import DATASETS

    return str(DATASETS[task][0].__module__.split(".")[1]) if task in DATASETS else task


def _extra(samples: Sequence[Graded]) -> dict[str, float]:
    names = [name for name in _EXTRA if any(name in sample.extra for sample in samples)]
    # A sample without an answer has no other readings: it follows nothing.
    return {
        name: math.fsum(sample.extra.get(name, 0.0) for sample in samples) / len(samples)
        for name in names
    }


def _beside(ours: Average, reported: Reported, label: str, part: Part, model: str) -> Comparison:
    found = compare(ours, reported, protocol=label, metric=part.metric, whole=part.items.whole)
    if reported.model == model:
        return found
    return replace(found, mismatches=("another model", *found.mismatches))
