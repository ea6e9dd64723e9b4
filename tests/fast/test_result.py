"""Figures of an evaluation from its samples, each against another way to compute it."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.benchmark import Benchmark, load_benchmarks, load_protocols
from prorl_nemo.evaluation.items import Item, Items
from prorl_nemo.evaluation.reported import load_reported
from prorl_nemo.evaluation.resampling import holm
from prorl_nemo.evaluation.result import (
    Graded,
    benchmark_result,
    compare_models,
    read_samples,
)
from prorl_nemo.evaluation.suite import Part, Suite, stored_suite, under_protocol
from prorl_nemo.evaluation.tables import Table, comparison_table, markdown_report, scores_table

EVAL = Path(__file__).parents[2] / "eval"
BENCHMARKS = load_benchmarks(EVAL)
PROTOCOLS = load_protocols(EVAL)


def part(benchmark: Benchmark, groups: list[str], samples: int, total: int | None = None) -> Part:
    items = [
        Item(f"{benchmark.name}/{i:03d}", "?", {"kind": benchmark.grader}, group)
        for i, group in enumerate(groups)
    ]
    return Part(benchmark, Items(items, "0" * 64, total or len(items), True), samples,
                benchmark.metric == "strict")  # fmt: skip


def made_up(part: Part, seed: int, good: float = 0.5) -> dict[str, list[Graded]]:
    rng = random.Random(seed)
    samples = {}
    for item in part.items.items:
        row = []
        for _ in range(part.samples):
            answer = rng.choice(["right", "wrong", "other", None])
            answer = "right" if rng.random() < good else answer
            score = 1.0 if answer == "right" else 0.0 if part.strict else rng.choice([0, 0.25])
            reason = "correct" if score == 1 else "wrong" if answer else "no answer: none"
            row.append(Graded(score, reason, rng.randint(1, 99), answer is None, answer))
        samples[item.item_id] = row
    return samples


def test_votes_are_those_of_all_subsets() -> None:
    one = part(BENCHMARKS["math500"], ["math500"] * 5, 6)
    samples = made_up(one, 1)
    votes = benchmark_result(one, samples, "prorl").votes
    assert votes is not None
    assert list(votes) == [1, 2, 4, 6]
    for k, value in votes.items():
        total = count = 0.0
        for row in samples.values():
            for chosen in itertools.combinations(row, k):
                ballots = Counter(s.answer for s in chosen if s.answer is not None)
                most = max(ballots.values(), default=0)
                ahead = [answer for answer, n in ballots.items() if n == most]
                total += ("right" in ahead) / len(ahead) if ahead else 0
                count += 1
        assert value == pytest.approx(total / count)


def test_an_answer_graded_in_two_ways_is_told_and_ends_nothing() -> None:
    one = part(BENCHMARKS["aime24"], ["aime24"], 2)
    samples = {"aime24/000": [Graded(1.0, "correct", 1, False, "7"),
                              Graded(0.0, "timed out: killed", 1, False, "7")]}  # fmt: skip
    result = benchmark_result(one, samples, "prorl")
    assert result.votes is None
    assert "graded both right and wrong" in result.notes[0]
    assert result.average.mean == 0.5


def test_means_over_tasks_and_categories() -> None:
    """Two tasks of arithmetic, one of games: categories weigh one and one, tasks two and one."""
    groups = ["chain_sum"] * 3 + ["gcd"] + ["countdown"] * 2
    one = part(BENCHMARKS["reasoning_gym"], groups, 1)
    scores = [1, 0, 0.5, 1, 0.25, 0.25]
    samples = {
        item.item_id: [Graded(score, "x", 1, False, None)]
        for item, score in zip(one.items.items, scores, strict=True)
    }
    result = benchmark_result(one, samples, "prorl")
    assert result.metric == "reward"
    assert result.average.mean == pytest.approx(3 / 6)
    assert result.groups == {"chain_sum": 0.5, "countdown": 0.25, "gcd": 1.0}
    assert result.task_mean == pytest.approx((0.5 + 0.25 + 1) / 3)
    assert result.category_mean == pytest.approx((0.75 + 0.25) / 2)
    # Partial credit passes nothing.
    assert result.pass_curve == [2 / 6]


def test_other_readings_of_ifeval_count_a_silent_response_as_nothing() -> None:
    one = part(BENCHMARKS["ifeval"], ["ifeval"], 2)
    extra = {"prompt_strict": 1.0, "prompt_loose": 1.0, "instruction_loose": 1.0}
    samples = {"ifeval/000": [Graded(1.0, "correct", 1, False, None, extra),
                              Graded(0.0, "no answer: nothing", 1, False)]}  # fmt: skip
    assert benchmark_result(one, samples, "prorl").extra == dict.fromkeys(extra, 0.5)


def test_a_subset_and_what_was_not_asked_are_notes() -> None:
    one = part(BENCHMARKS["gsm8k"], ["gsm8k"] * 2, 1, total=1319)
    samples = {"gsm8k/000": [Graded(1.0, "correct", 1, False, "1")],
               "gsm8k/001": [Graded(0.0, "not asked: too long", 0, False)]}  # fmt: skip
    result = benchmark_result(one, samples, "prorl")
    assert result.notes == ["2 of 1319 items", "1 samples could not be asked, and count as 0"]
    assert result.average.mean == 0.5


def test_scores_that_are_all_alike_claim_no_certainty() -> None:
    one = part(BENCHMARKS["aime24"], ["aime24"] * 30, 2)
    for score, low, high in ((0.0, 0.0, 0.1157), (1.0, 0.8843, 1.0)):
        samples = {
            item.item_id: [Graded(score, "x", 1, False, "1")] * 2 for item in one.items.items
        }
        result = benchmark_result(one, samples, "prorl")
        # Tables of Clopper and Pearson: 0 of 30 at 95 % gives 11.57 %.
        assert result.interval.low == pytest.approx(low, abs=5e-5)
        assert result.interval.high == pytest.approx(high, abs=5e-5)
        assert result.pass_interval == result.interval


def test_missing_samples_are_never_averaged_over() -> None:
    one = part(BENCHMARKS["gsm8k"], ["gsm8k"] * 2, 2)
    suite = Suite(PROTOCOLS["prorl"], "prorl", 0, [one])
    row = {"score": 1.0, "reason": "correct", "tokens": 1, "truncated": False, "answer": None}
    rows = [
        {**row, "item": f"gsm8k/00{i}", "sample": j, "parts": {}} for i in (0, 1) for j in (0, 1, 2)
    ]
    assert [len(v) for v in read_samples(suite, rows).values()] == [2, 2]
    with pytest.raises(UserError, match="1 of 4 samples are missing"):
        read_samples(suite, rows[:4])


def test_a_reported_number_of_another_model_says_so() -> None:
    reported = load_reported(EVAL / "reported", set(BENCHMARKS))
    one = part(BENCHMARKS["aime24"], ["aime24"] * 30, 16)
    samples = made_up(one, 3)
    model = "Nemotron-Research-Reasoning-Qwen-1.5B-v2"
    for name, first in ((model, ()), ("mine", ("another model",))):
        result = benchmark_result(one, samples, "prorl", reported, name)
        found = next(
            c for c in result.comparisons
            if c.reported.model == model and c.reported.metric == "avg@16"
        )  # fmt: skip
        assert found.mismatches == first
        assert found.difference == pytest.approx(100 * result.average.mean - 49.58)
        table = comparison_table([result])
        assert len(table.rows) == len(result.comparisons)
        assert {"inside noise", "outside noise", "–"} >= {row[4] for row in table.rows}  # noqa: RUF001


def test_models_are_compared_by_item() -> None:
    one = part(BENCHMARKS["math500"], ["math500"] * 40, 4)
    suite = Suite(PROTOCOLS["prorl"], "prorl", 0, [one])
    weak, strong = made_up(one, 1, 0.2), made_up(one, 2, 0.7)
    (found,) = compare_models(suite, strong, suite, weak)
    assert found.paired.difference == pytest.approx(found.mean_a - found.mean_b)
    assert found.adjusted_p == found.paired.p_value < 0.01
    (same,) = compare_models(suite, weak, suite, weak)
    assert (same.paired.difference, same.paired.p_value) == (0, 1)
    other = replace(one, strict=False)
    with pytest.raises(UserError, match="strict scores and the other"):
        compare_models(suite, weak, replace(suite, parts=[other]), weak)
    with pytest.raises(UserError, match="no benchmark in common"):
        compare_models(suite, weak, replace(suite, parts=[]), weak)


def test_holm_by_hand() -> None:
    """0.01 x 4, 0.02 x 3 = 0.06, 0.03 x 2 = 0.06, 0.5 x 1; never below the one before."""
    p = {"d": 0.5, "a": 0.01, "c": 0.03, "b": 0.02}
    assert holm(p) == pytest.approx({"d": 0.5, "a": 0.04, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_holm_keeps_its_promise() -> None:
    """Among benchmarks without any difference, one below 0.05 is there in 5 % of the cases."""
    rng = random.Random(5)
    trials = 4000
    wrong = sum(
        min(holm({str(i): rng.random() for i in range(6)}).values()) < 0.05 for _ in range(trials)
    )
    # Exactly 1 - (1 - 0.05 / 6) ** 6 = 0.0490; three standard deviations of a share are 0.0102.
    assert wrong / trials == pytest.approx(0.0490, abs=0.0102)


def test_a_stored_suite_is_the_one_that_was_asked() -> None:
    one = part(BENCHMARKS["gsm8k"], ["gsm8k"] * 3, 2)
    suite = Suite(PROTOCOLS["prorl"], "prorl (max_tokens 9)", 7, [one])
    assert stored_suite(suite.manifest({"name": "m"}), suite.item_records()) == suite
    with pytest.raises(UserError, match="2 items are kept of 3"):
        stored_suite(suite.manifest({}), suite.item_records()[:2])
    with pytest.raises(UserError, match="another version"):
        stored_suite({"protocol": {}}, [])


def test_another_protocol_reads_the_same_samples_where_it_can() -> None:
    rg = BENCHMARKS["reasoning_gym"]
    tasks = [task for task in rg.data.tasks[:4] for _ in range(100)]
    suite = Suite(PROTOCOLS["prorl"], "prorl", 0, [part(rg, tasks, 16)])
    fewer = PROTOCOLS["prorl"].model_copy(update={"samples": 4, "items": 96 * 3})
    (read,) = under_protocol(suite, fewer).parts
    # Three of each task, as a limit takes them, and not the first ones by name.
    assert Counter(item.group for item in read.items.items) == dict.fromkeys(rg.data.tasks[:4], 3)
    # One of each task is what a limit of 100 gives as well as one of 96, but not one of 192.
    each = Suite(PROTOCOLS["prorl"], "prorl", 0, [part(rg, list(rg.data.tasks), 16, total=9600)])
    limited = [PROTOCOLS["prorl"].model_copy(update={"items": n}) for n in (100, 192)]
    assert len(under_protocol(each, limited[0]).parts[0].items.items) == 96
    with pytest.raises(UserError, match=r"wants 16 samples of 192 items .* there are 16 of 96"):
        under_protocol(each, limited[1])
    strict = PROTOCOLS["prorl"].model_copy(update={"scoring": "strict"})
    assert under_protocol(suite, strict).parts[0].strict
    for change, part_of_it in (
        ({"samples": 17}, "wants 17 samples"),
        ({"benchmarks": ["aime24"]}, "about none"),
    ):
        with pytest.raises(UserError, match=part_of_it):
            under_protocol(suite, PROTOCOLS["prorl"].model_copy(update=change))
    with pytest.raises(UserError, match=r"temperature: 0.6 there, 0.7 now"):
        under_protocol(suite, PROTOCOLS["justrl"])


def test_tables_hold_hostile_names() -> None:
    table = Table("t", ["a", "b"], [["x|y\n`z`<b>\x1b[31m", "1"]])
    assert "| x\\|y 'z'&lt;b>\x1b[31m | 1 |" in table.markdown()
    one = part(BENCHMARKS["gsm8k"], ["gsm8k"] * 3, 2)
    suite = Suite(PROTOCOLS["prorl"], "prorl", 0, [one])
    result = benchmark_result(one, made_up(one, 1), "prorl")
    page = markdown_report([result], suite.manifest({"name": "a|<script>", "sha256": None}))
    assert "<script>" not in page
    assert all(len(row) == len(scores_table([result], "").columns)
               for row in scores_table([result], "").rows)  # fmt: skip
