"""Reasoning Gym's scorers, and the gate before those that evaluate the answer."""

from __future__ import annotations

import ast
import math
from typing import Any

import pytest
import reasoning_gym

from prorl_nemo.rewards import confinement, logic
from prorl_nemo.rewards.registry import grade
from prorl_nemo.rewards.verdict import GradingError


def record(task: str, index: int = 0) -> dict[str, Any]:
    entry = reasoning_gym.create_dataset(task, size=index + 1, seed=3)[index]
    return {"kind": "reasoning_gym", "task": task, "entry": entry}


def scored(task: str, answer: str, index: int = 0) -> float:
    entry = record(task, index)["entry"]
    scorer = reasoning_gym.create_dataset(task, size=1, seed=3)
    return logic.score(task, scorer, answer, entry).score


@pytest.mark.parametrize(
    "task", ["basic_arithmetic", "leg_counting", "syllogism", "caesar_cipher", "complex_arithmetic"]
)
def test_gold_answers_score_one(task: str) -> None:
    for index in range(5):
        item = record(task, index)
        answer = item["entry"]["answer"]
        assert grade(item, f"So it is\n<answer>\n {answer} \n</answer>").score == 1.0
        assert grade(item, f"It is {answer}").score == 0.0


def test_the_score_is_the_library_s_own() -> None:
    item = record("countdown")
    answer = "1 + 1"
    dataset = reasoning_gym.create_dataset("countdown", size=1, seed=3)
    expected = dataset.score_answer(answer, item["entry"])
    assert 0 < expected < 1
    assert scored("countdown", answer) == expected


@pytest.mark.parametrize("answer", ["True", "False", "garbage", "1"])
def test_game_of_life_halting_is_corrected(answer: str) -> None:
    item = record("game_of_life_halting")
    verdict = grade(item, f"<answer>{answer}</answer>")
    assert verdict.parts["upstream"] == 1.0  # the library's bug
    assert verdict.score == float(answer == item["entry"]["answer"])


def test_not_a_number_is_not_every_number() -> None:
    item = record("complex_arithmetic")
    verdict = grade(item, "<answer>nan</answer>")
    assert (verdict.parts["upstream"], verdict.score) == (1.0, 0.0)


def test_a_short_prefix_is_not_a_probability() -> None:
    item = record("coin_flip")
    gold = item["entry"]["answer"]
    verdict = grade(item, "<answer>0</answer>")
    assert verdict.parts["upstream"] == 1.0
    # One shared character, divided by the longer text.
    assert verdict.score == pytest.approx(1 / len(f"{float(gold):.10g}"))
    assert grade(item, f"<answer>{gold}</answer>").score == 1.0


@pytest.mark.parametrize("answer", ["heads", "1/0", "one half", "1e400"])
def test_what_is_no_probability_is_wrong(answer: str) -> None:
    assert grade(record("coin_flip"), f"<answer>{answer}</answer>").score == 0.0


@pytest.mark.parametrize("answer", ["(1 + 2 + 3) * 4", "7 * 7 * 1 / 2"])
def test_one_solution_does_not_solve_every_puzzle24(answer: str) -> None:
    """Upstream asks neither for the given numbers, nor for 24 itself: 24.5 will do."""
    entry = {"answer": "gold", "metadata": {"numbers": [1, 2, 7, 7]}}
    scorer = reasoning_gym.create_dataset("puzzle24", size=1)
    assert scorer.score_answer(answer, entry) == 1.0
    assert logic.score("puzzle24", scorer, answer, entry).score == 0.01
    for index in range(3):
        gold = record("puzzle24", index)["entry"]["answer"]
        assert scored("puzzle24", f"({gold})", index) == 1.0


@pytest.mark.parametrize("task", sorted(logic.EVALUATING_TASKS))
def test_evaluating_tasks_are_refused_outside_a_worker(task: str) -> None:
    assert not confinement.active()
    item = {"kind": "reasoning_gym", "task": task, "entry": {"answer": "1", "metadata": {}}}
    with pytest.raises(GradingError, match="GraderPool"):
        grade(item, "<answer>1</answer>")


HOSTILE = [
    "__import__('os').system('true')",
    "().__class__.__bases__[0].__subclasses__()",
    "9**9**9",
    "9**999",
    "2**(9**9)",
    "2**(60*60*60*60*60)",
    "2**(1/0.000000001)",
    "9**(99999999/(3-2))",
    "9**(1/(1-0.99999999))",
    "9**(0*(1-2)*99999999/(3-2))",
    "(((9**64)**64)**64)**64",
    "-" * 1000 + "1**99",
    "(lambda: 1)()",
    "[x for x in range(9)]",
    "eval('1')",
    "open('/etc/passwd').read()",
    "f'{1}'",
    "1 if 1 else 2",
    "x.__class__",
    "exp(exp)(x)",
    "sin(x, evaluate=False)",
    "factorial(9999999)",
    "10" * 60,
    "a" * 3000,
    "(" * 150 + "1" + ")" * 150,
    "1\x00",
    "\ud800",
    "0x" + "f" * 200,
]


@pytest.mark.parametrize("answer", HOSTILE)
@pytest.mark.parametrize("task", ["countdown", "simple_integration", "n_queens"])
def test_hostile_answers_never_reach_a_scorer(task: str, answer: str) -> None:
    reached: list[str] = []

    class Scorer:
        def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
            reached.append(answer)  # Judged below: what a scorer raises is only a zero.
            return 0.0

    assert logic.score(task, Scorer(), answer, {"answer": "gold"}).score == 0.0
    for text in reached:
        # What passes the gate must be harmless: a literal, or no Python at all.
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            assert task == "n_queens"
            continue
        ast.literal_eval(tree)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("countdown", "(3 + 4) * 12 / 2 - 1"),
        ("puzzle24", "(1 + 2 + 3) * 4"),
        ("simple_integration", "3*x**2/2 - 0.5*x**(1/2) + C"),
        ("intermediate_integration", "-2*exp(3*x)*cos(2*x)/13 + log(x) + C"),
        ("polynomial_multiplication", "-60*x**5 + 12*y**2*x - 3"),
        ("binary_matrix", "[[0, 1], [1, 0]]"),
        ("binary_matrix", "0 1\n1 0"),
        ("string_insertion", "['A', 'B']"),
        ("string_insertion", "A B"),
        ("n_queens", "_ Q\nQ _"),
    ],
)
def test_honest_answers_pass_the_gate(task: str, answer: str) -> None:
    assert logic._refusal(task, answer, {"answer": "gold"}) is None


def test_every_gold_answer_of_the_evaluating_tasks_passes_the_gate() -> None:
    for task in sorted(logic.EVALUATING_TASKS):
        for item in reasoning_gym.create_dataset(task, size=10, seed=5):
            if "Integral(" in item["answer"] or item["answer"].isidentifier():
                # Sympy gave up, and so did the library; or a bare word, which evaluates to
                # nothing and earns its point by equality, before the gate.
                continue
            different_gold = {**item, "answer": "another"}
            assert logic._refusal(task, item["answer"], different_gold) is None, item["answer"]


def test_an_integral_left_undone_is_no_antiderivative() -> None:
    """Its derivative is the integrand, so that the library's scorer would accept it."""
    entry = {"answer": "x**2/2 + C", "metadata": {"variable": "x", "integrand": "x"}}
    scorer = reasoning_gym.create_dataset("intermediate_integration", size=1)
    assert scorer.score_answer("Integral(x, x)", entry) == 1.0
    assert logic.score("intermediate_integration", scorer, "Integral(x, x)", entry).score == 0.0


@pytest.mark.parametrize(
    "answer", ["1e999999999", "3/1e99999", "-1E+12345", "1e9_999_999", "1_0e99_99"]
)
def test_huge_powers_of_ten_are_refused(answer: str) -> None:
    assert grade(record("coin_flip"), f"<answer>{answer}</answer>").reason.startswith("refused")


def test_hexadecimal_digits_are_no_power_of_ten() -> None:
    assert logic._refusal("bitwise_arithmetic", "0x1e12345", {"answer": "0x0"}) is None


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (ZeroDivisionError, "wrong: the scorer failed (ZeroDivisionError)"),
        (None, "wrong: the scorer failed (TypeError)"),
        (math.nan, "wrong: the scorer returned no number"),
        (7.0, "correct"),
        (-1.0, "wrong"),
    ],
)
def test_whatever_a_scorer_does_is_a_score(said: Any, reason: str) -> None:
    class Scorer:
        def score_answer(self, answer: str, entry: dict[str, Any]) -> Any:
            if said is ZeroDivisionError:
                raise said
            return said

    verdict = logic.score("leg_counting", Scorer(), "1", {"answer": "2"})
    assert (verdict.score, verdict.reason) == (float(said == 7.0), reason)


@pytest.mark.parametrize(
    "item",
    [
        {"kind": "reasoning_gym"},
        {"kind": "reasoning_gym", "task": "no_such_task", "entry": {"answer": ""}},
        {"kind": "reasoning_gym", "task": "leg_counting", "entry": {}},
        {"kind": "reasoning_gym", "task": ["leg_counting"], "entry": {"answer": "1"}},
        {
            "kind": "reasoning_gym",
            "task": "leg_counting",
            "entry": {"answer": "1"},
            "config": {"no_such_setting": 1},
        },
        {"kind": "no_such_kind"},
        {},
    ],
)
def test_malformed_records_are_errors(item: dict[str, Any]) -> None:
    with pytest.raises(GradingError, match="grading"):
        grade(item, "<answer>1</answer>")


def test_the_scorer_knows_the_task_s_settings() -> None:
    """decimal_arithmetic tolerates one unit in the last of its decimal places."""
    entry = {"answer": "1.50", "metadata": {}}
    item = {"kind": "reasoning_gym", "task": "decimal_arithmetic", "entry": entry}
    coarse = {"max_num_decimal_places": 1, "min_num_decimal_places": 1}
    fine = {"max_num_decimal_places": 6, "min_num_decimal_places": 1}
    assert grade({**item, "config": coarse}, "<answer>1.6</answer>").score == 1.0
    assert grade({**item, "config": fine}, "<answer>1.6</answer>").score == 0.0
