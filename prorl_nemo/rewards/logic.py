"""Logic: the scorer that Reasoning Gym ships with each of its tasks (ProRL, section 3.4).

Its scorers were written for well-meant answers. Nine of them hand the model's text to
Python's `eval` or to sympy's parser, which evaluates too, so that an answer could run code
or hang for ever. Those tasks are scored only inside a confined worker (`pool`), and only
when the answer first passes a gate: a literal, or arithmetic with small exponents.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from prorl_nemo.rewards import confinement
from prorl_nemo.rewards.extraction import final_part, last_tag
from prorl_nemo.rewards.verdict import GradingError, Verdict, zero

# Scorers that call eval() on the answer: honest answers are plain literals.
LITERAL_TASKS = frozenset({"binary_matrix", "spiral_matrix", "string_insertion", "n_queens"})
# Scorers that call sympy's parse_expr on the answer.
ARITHMETIC_TASKS = frozenset({"countdown", "puzzle24"})
ALGEBRA_TASKS = frozenset(
    {"simple_integration", "intermediate_integration", "polynomial_multiplication"}
)
EVALUATING_TASKS = LITERAL_TASKS | ARITHMETIC_TASKS | ALGEBRA_TASKS

# The longest honest answers (large sudoku, sokoban, code tasks) stay below 10,000 characters.
MAX_ANSWER = 20_000
MAX_EXPRESSION = 2_000
# 20 is the largest exponent that the algebra tasks of the library produce, with room.
MAX_EXPONENT = 64
MAX_DIGITS = 50

_HUGE_POWER_OF_TEN = re.compile(r"(?<![\w.])[\d._]+[eE][+-]?\d[\d_]{3,}(?!\w)")
_TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan"}
_FUNCTIONS = _TRIGONOMETRIC | {"sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt", "Abs"}
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.UAdd, ast.USub)


def grade(grading: dict[str, Any], text: str, training: bool = True) -> Verdict:
    """Score a response to a Reasoning Gym item.

    Args:
        grading: `task` (registered name), `entry` (the item: question, answer, metadata)
            and optionally `config` (the task's settings, where its scorer depends on them).
        text: the response; its answer is the last <answer> pair after the thinking.
        training: makes no difference; the paper evaluates with the same continuous score.

    Raises:
        GradingError: unknown task or malformed entry, or an evaluating task outside a
            confined worker.
    """
    task, entry = grading.get("task"), grading.get("entry")
    if not isinstance(task, str) or not isinstance(entry, dict) or "answer" not in entry:
        raise GradingError("grading: a reasoning_gym record has `task` and `entry` (the item)")
    if task in EVALUATING_TASKS and not confinement.active():
        raise GradingError(
            f"grading.task: {task} is scored by evaluating the answer; grade it through GraderPool"
        )
    scorer = _scorer(task, json.dumps(grading.get("config") or {}, sort_keys=True))
    answer = last_tag(final_part(text, grading))
    if answer is None:
        return zero("no answer: no <answer>...</answer> after the thinking")
    return score(task, scorer, answer, entry)


def score(task: str, scorer: Any, answer: str, entry: dict[str, Any]) -> Verdict:
    """Score an extracted answer with `scorer` (the task's data set)."""
    if not answer:
        return zero("no answer: the <answer> tag is empty")
    if len(answer) > MAX_ANSWER:
        return zero(f"refused: the answer has {len(answer)} characters, {MAX_ANSWER} are allowed")
    refusal = _refusal(task, answer, entry)
    if refusal:
        return zero(f"refused: {refusal}")
    if task in _TUPLES:
        metadata = entry["metadata"]
        board = tuple(tuple(row) for row in metadata["output"])
        entry = entry | {"metadata": metadata | {"output": board}}
    try:
        raw = float(scorer.score_answer(answer, entry))
    except Exception as error:  # the library's scorers raise on parseable but odd answers
        return zero(f"wrong: the scorer failed ({type(error).__name__})", upstream_error=True)
    if not math.isfinite(raw):
        return zero("wrong: the scorer returned no number", upstream_error=True)
    upstream = min(1.0, max(0.0, raw))
    correct = _CORRECTED.get(task)
    value = correct(answer, entry, upstream) if correct else upstream
    return Verdict(value, {"upstream": upstream}, _describe(value))


def extra_seconds(grading: dict[str, Any]) -> float:
    """Building these scorers takes seconds, once for each worker: not the response's fault."""
    return 10.0 if str(grading.get("task")) in _SLOW_TO_BUILD else 0.0


# Compared with tuples, which JSON turned into lists.
_TUPLES = frozenset({"arc_agi", "rearc"})
_SLOW_TO_BUILD = frozenset({"arc_agi", "figlet_font", "rearc"})


def _describe(value: float) -> str:
    if value >= 1.0:
        return "correct"
    return "wrong" if value <= 0.0 else f"partly: {value:.3g}"


def _halting(answer: str, entry: dict[str, Any], upstream: float) -> float:
    """Upstream compares the truth of two non-empty strings, so that any text scores 1."""
    return float(answer.lower() == str(entry["answer"]).lower())


def _complex(answer: str, entry: dict[str, Any], upstream: float) -> float:
    """Upstream takes min(1, exp(-distance)), which is 1 for a distance of NaN."""
    return 0.0 if "nan" in answer.lower() else upstream


def _coin_flip(answer: str, entry: dict[str, Any], upstream: float) -> float:
    """Upstream divides the common prefix by the shorter text, so that "0" scores 1."""
    if upstream == 0.0:
        return 0.0  # perhaps no number at all
    given, gold = (Fraction(text.replace(",", "")) for text in (answer, str(entry["answer"])))
    if abs(given - gold) <= Fraction(1, 10_000):
        return 1.0
    lengths = sorted(len(f"{float(number):.10g}") for number in (given, gold))
    return upstream * lengths[0] / lengths[1]


def _puzzle24(answer: str, entry: dict[str, Any], upstream: float) -> float:
    """Upstream takes any four small numbers for those given, and 24.5 for 24."""
    if upstream < 1.0:
        return upstream
    used = sorted(int(number) for number in re.findall(r"\b\d+\b", answer))
    given = sorted(entry["metadata"]["numbers"])
    exact = importlib.import_module("sympy").parse_expr(answer) == 24
    return 1.0 if used == given and exact else 0.01


# Scorers of reasoning-gym 0.1.25 that give full marks to a constant answer.
_CORRECTED: dict[str, Callable[[str, dict[str, Any], float], float]] = {
    "game_of_life_halting": _halting,
    "complex_arithmetic": _complex,
    "coin_flip": _coin_flip,
    "puzzle24": _puzzle24,
}


def _refusal(task: str, answer: str, entry: dict[str, Any]) -> str | None:
    """Why the answer may not reach the scorer, or None."""
    if answer == entry["answer"]:
        return None
    if _HUGE_POWER_OF_TEN.search(answer):
        # Fraction("1e999999999") computes the power.
        return "a number with a huge exponent"
    if task not in EVALUATING_TASKS:
        return None
    if len(answer) > MAX_EXPRESSION:
        return f"an expression of more than {MAX_EXPRESSION} characters"
    try:
        tree = ast.parse(answer, mode="eval")
        if task not in LITERAL_TASKS:
            return _expression_refusal(tree, names=task in ALGEBRA_TASKS)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        # Rows of a board, a bare word: eval() would fail too, comparison may succeed.
        return None if task in LITERAL_TASKS else "not an expression"
    return _literal_refusal(tree)


def _literal_refusal(tree: ast.Expression) -> str | None:
    try:
        ast.literal_eval(tree)
    except (ValueError, TypeError, MemoryError, RecursionError):
        return "not a plain literal"
    return None


def _expression_refusal(tree: ast.Expression, names: bool) -> str | None:
    """Why an expression may not be evaluated: anything but small arithmetic is refused."""
    for node in ast.walk(tree):
        match node:
            case ast.Expression() | ast.UnaryOp() | ast.BinOp() | ast.Load():
                continue
            case ast.operator() | ast.unaryop():
                if not isinstance(node, _OPERATORS):
                    return f"operator {type(node).__name__} in an expression"
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                if abs(value) > 10**MAX_DIGITS:
                    return "a number with too many digits"
            case ast.Name(id=name) if names and (len(name) == 1 or name in _FUNCTIONS | {"pi"}):
                continue
            case ast.Call(func=ast.Name(id=name), keywords=[]) if names and name in _FUNCTIONS:
                continue
            case _:
                return f"{type(node).__name__} in an expression"
    if _power(tree) > MAX_EXPONENT:
        return "an exponent that is not a small number"
    return None


def _power(node: ast.AST) -> float:
    """The largest exponent in an expression; those of a power of a power multiply."""
    inner = max((_power(child) for child in ast.iter_child_nodes(node)), default=1.0)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return inner * max(1.0, abs(_exponent(node.right)))
    return inner


def _exponent(node: ast.expr) -> float:
    """The value of a literal number, or of products and quotients of such; inf for all else.

    A symbolic exponent such as exp(1)**x counts as 1: it is left to sympy, uncomputed.
    """
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.UnaryOp(operand=operand):
            return _exponent(operand)
        case ast.BinOp(op=ast.Mult() | ast.Div() as op, left=left, right=right):
            a, b = _exponent(left), _exponent(right)
            divides = isinstance(op, ast.Div)
            # What is not known stays so: 10**8 / (3 - 2) is no 0.
            if math.inf in (abs(a), abs(b)) or (divides and b == 0):
                return math.inf
            return a / b if divides else a * b
        case ast.Name(id=name) if len(name) == 1:
            return 1.0
    return math.inf


@lru_cache(maxsize=256)
def _scorer(task: str, config: str) -> Any:
    """The task's data set with `config` (JSON); only its `score_answer` is used."""
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise GradingError(f"grading.task: Reasoning Gym has no task {task!r}")
    dataset_class, config_class = DATASETS[task]
    try:
        return dataset_class(config=config_class(**json.loads(config)))
    except (TypeError, ValueError, AssertionError) as error:
        raise GradingError(f"grading.config: {task} refuses it: {error}") from None


def warm_up() -> None:
    """Import the library, in the process that workers are forked from."""
    importlib.import_module("reasoning_gym")
