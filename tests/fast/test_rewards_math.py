"""Mathematical answers: equivalent forms verify, near misses do not."""

from __future__ import annotations

import itertools
import string
import time
from fractions import Fraction
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from prorl_nemo.rewards.latex_text import elements, rational, tidy
from prorl_nemo.rewards.latex_value import _GREEK, same_value
from prorl_nemo.rewards.math import accepted_by, hostile
from prorl_nemo.rewards.registry import grade
from prorl_nemo.rewards.verdict import GradingError

EQUIVALENT = [
    ("7", "7.0"), ("7", "07"), (r"\frac12", "1/2"), (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", ".5"), (r"3\frac{1}{2}", "3 1/2"), (r"\frac{7}{2}", "3 1/2"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"1\frac{4}{5}", "1.8"), ("0.00012", "1.2e-4"),
    ("0.00012", r"1.2 \times 10^{-4}"), ("1,000", "1000"), ("1{,}000", "1000"),
    (r"\$32{,}348", "32348"), (r"50\%", "50"), (r"90^\circ", "90"), (r"5\text{ cm}", "5"),
    ("5", "5 cm^2"), ("5", "x = 5"), ("x=5", "5"), (r"\text{east}", "East"),
    (r"\text{(C)}", "C"), (r"\sqrt{2}", "√2"), (r"11\sqrt{2}", r"11\sqrt2"),
    (r"\frac{\sqrt{3}}{2}", r"\frac{3}{2\sqrt3}"), ("-1", r"e^{i\pi}"), (r"\log_2 8", "3"),
    ("x^2-1", "(x-1)(x+1)"), ("2+3i", "3i+2"), ("3", "|-3|"), ("120", "5!"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3,\pi/2)"), ("1,2", "2,1"), (r"\{1,2\}", r"\{2,1\}"),
    (r"(2,\infty)", "x>2"), (r"-2<x<3", "(-2,3)"), ("2516_8", "2516_8"),
    ("(3,100)", "(3, 100)"), (r"\{1,100\}", r"\{1,\,100\}"), ("(1,000, 2,000)", "(1000, 2000)"),
    (r"(1\,000, 2)", "(1000,2)"), ("x_1+x_2", "x_{2}+x_{1}"), (r"\frac{h}{\lambda}", r"h/\lambda"),
    ("2^{100}-1", "-1+2^{100}"), ("18446744073709551616", "2^{64}"),
    ("6r^2-4r-24", "6r^2 - 4r - 24"), (r"\sin^2 x + \cos^2 x", "1"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
]  # fmt: skip
NEAR_MISSES = [
    ("7", "8"), ("7", "-7"), ("7", "7.0001"), ("28", "28.0001"), (r"\frac13", "0.333"),
    (r"\frac13", "0.3333333"), (r"\pi", "3.14159"), (r"\pi", "3.141593"),
    (r"\sqrt{2}", "1.41421"), ("10", "0.1"), (r"10\%", "0.1"), (r"\frac{3}{4}", r"75\%"),
    ("2516_8", "2516_7"), ("(1,2)", "[1,2]"), ("(1,2)", "(2,1)"), ("7", r"\{3,7\}"),
    ("7", "3,7"), ("7", "7 or 8"), ("C", "D"), ("p - q", "q-p"), ("a+b", "A+B"),
    ("x^2-1", "(x-1)(x+2)"), ("2", r"\text{two}"), ("12", "9^{9^{9}}"), ("1,2", "1,2,3"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\frac{h}{\lambda}", "1"), (r"\beta", "m"), (r"\mu", r"\sigma"), ("a_2+b_1", "2a_2"),
    ("x_1+x_2", "x_1+x_3"), ("3 1/2", "31/2"), ("(3,100)", "3100"), ("3100", "(3,100)"),
    ("2^{100}-1", "2^{100}"), ("2^{64}", "18446744073709551615"), ("x^{99}+1", "x^{99}"),
    (r"\frac{2^{30}-1}{2^{30}}", "1"), (r"6.6\times10^{-34}", r"1.6\times10^{-19}\text{ J}"),
    (r"1.6\times10^{-19}\text{ C}", "0"), ("0", r"1.6\times10^{-19}\text{ C}"),
    (r"\frac{1}{2}", r"\frac{2}{1}"), ("x>2", "x<2"), ("x>2", r"x \ge 2"), ("5", ""), ("5", "."),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), EQUIVALENT)
def test_equivalent_forms(gold: str, answer: str) -> None:
    assert accepted_by(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), NEAR_MISSES)
def test_near_misses(gold: str, answer: str) -> None:
    assert accepted_by(gold, answer) is None


@pytest.mark.parametrize(
    ("response", "score", "reason"),
    [
        (r"so \boxed{7}", 1.0, "correct"),
        (r"\boxed{3} no: \boxed{7}", 1.0, "correct"),
        (r"\boxed{7} no: \boxed{3}", 0.0, "wrong"),
        (r"<think>\boxed{7}</think> \boxed{3}", 0.0, "wrong"),
        (r"<think>\boxed{7}", 0.0, "no answer"),
        ("the answer is 7", 0.0, "no answer"),
        (r"\boxed{7", 0.0, "no answer"),
        (r"\boxed{}", 0.0, "no answer"),
        (r"\boxed{" + "7" * 500 + "}", 0.0, "refused"),
    ],
)
def test_grading(response: str, score: float, reason: str) -> None:
    verdict = grade({"kind": "math", "answer": "7"}, response)
    assert (verdict.score, verdict.reason.split(":")[0]) == (score, reason)


@pytest.mark.parametrize("gold", [7, 7.0, "7", ["9", "7"], r"7\text{ cm}"])
def test_kinds_of_gold_answers(gold: Any) -> None:
    assert grade({"kind": "math", "answer": gold}, r"\boxed{7}").score == 1.0


@pytest.mark.parametrize("gold", [None, "", [], {}, True, [None]])
def test_a_record_without_gold_is_an_error(gold: Any) -> None:
    with pytest.raises(GradingError, match="answer"):
        grade({"kind": "math", "answer": gold}, r"\boxed{7}")


HOSTILE = [
    "9^{9^{9}}", "9**9**9", "10^{1000000}", "(x+1)^{100000}", "99999!", "(((5!)!)!)!",
    r"\binom{99999}{50000}", r"\sum_{n=1}^{99} n", r"\int_0^1 x dx", r"\prod_{i=1}^{99} i",
    r"\lim_{x\to 0} x", "((((" * 80, r"\frac{" * 60, "^" * 300, r"\sqrt{" * 60, "1_" * 150,
    "\x00", "\ud800", "{" * 300, "$" * 300, "\\" * 300, r"\begin{pmatrix}" * 20, "x^y^z^w" * 40,
    r"9^{\,9999999}", "9^{1,000,000,000}", r"\left(9999999\right)!",
    "0." + "9" * 390, "1" * 399, "e^" * 150, "2^" * 130 + "2", r"\text{" * 60,
]  # fmt: skip


@pytest.mark.parametrize("answer", HOSTILE)
@pytest.mark.parametrize("gold", ["12", "x^2+1", r"\frac{1}{2}"])
def test_hostile_answers_are_wrong_and_cheap(gold: str, answer: str) -> None:
    start = time.process_time()
    verdict = grade({"kind": "math", "answer": gold}, rf"\boxed{{{answer}}}")
    assert verdict.score == 0.0
    # None of these may reach a computation. Of processor time: the machine may have other work.
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("answer", ["2^{2010}", "10^{100}", r"\binom{100}{50}", "20!", "x^{12}"])
def test_ordinary_large_numbers_are_not_hostile(answer: str) -> None:
    assert not hostile(answer)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", Fraction(12)), ("-1.25", Fraction(-5, 4)), (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)), (r"-\frac{3}{4}", Fraction(-3, 4)), ("2 1/3", Fraction(7, 3)),
        (r"-2\frac{1}{3}", Fraction(-7, 3)), ("1.5e3", Fraction(1500)), ("1/0", None),
        (r"\frac{1}{0}", None), ("x", None), ("", None), ("1.2.3", None), ("1e9999", None),
    ],
)  # fmt: skip
def test_rational(text: str, value: Fraction | None) -> None:
    assert rational(text) == value


@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**6))
def test_every_fraction_survives_every_spelling(number: Fraction) -> None:
    top, bottom = number.numerator, number.denominator
    for text in (
        f"{top}/{bottom}",
        rf"\frac{{{top}}}{{{bottom}}}",
        rf"$\dfrac{{{top}}}{{{bottom}}}$",
    ):
        assert rational(text) == number


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> tuple[str, sympy.Expr]:
    """A LaTeX text and, built beside it, what sympy makes of the same expression."""
    if depth == 0 or draw(st.booleans()):
        leaf = draw(st.sampled_from(["x", "y", "2", "3", "7", r"\pi"]))
        value = sympy.pi if leaf == r"\pi" else sympy.sympify(leaf)
        if leaf in "xy":
            value = sympy.Symbol(leaf, positive=True)
        return leaf, value
    left_text, left = draw(expressions(depth=depth - 1))
    right_text, right = draw(expressions(depth=depth - 1))
    kind = draw(st.sampled_from("+-*/^r"))
    if kind == "+":
        return f"({left_text}+{right_text})", left + right
    if kind == "-":
        return f"({left_text}-{right_text})", left - right
    if kind == "*":
        return rf"({left_text}\cdot {right_text})", left * right
    if kind == "/":
        return rf"\frac{{{left_text}}}{{{right_text}}}", left / right
    if kind == "^":
        return rf"({left_text})^{{2}}", left**2
    return rf"\sqrt{{{left_text}^2}}", sympy.sqrt(left**2)


@settings(deadline=None, max_examples=60)
@given(expressions(), expressions())
def test_values_agree_with_sympy(
    first: tuple[str, sympy.Expr], second: tuple[str, sympy.Expr]
) -> None:
    """The slow reference: sympy's own simplification of the difference."""
    answer = same_value(tidy(first[0]), tidy(second[0]))
    difference = sympy.simplify(first[1] - second[1])
    if answer is True:
        assert difference == 0
    elif answer is False:
        assert difference != 0


def test_a_value_needs_the_whole_text() -> None:
    for text in (
        "(1",
        "1)",
        "1 2",
        "x^12",
        r"\frac{1}",
        "1=1",
        "1,2",
        r"\unknown{3}",
        "",
        "0^{-1}",
    ):
        assert same_value(text, text) is None


def test_no_two_names_have_one_value() -> None:
    letters = string.ascii_letters
    names = [*letters, *(f"\\{name}" for name in sorted(_GREEK))]
    names += [f"{a}_{b}" for a in "abxy" for b in "0123n"] + ["x_{10}", "x_{01}"]
    for first, second in itertools.combinations(names, 2):
        assert same_value(first, second) is False, (first, second)


def test_elements() -> None:
    assert elements("(1, (2,3), 4]") == ("(]", ["1", " (2,3)", " 4"])
    assert elements("(a)(b)") is None
    assert elements("(a)") is None
    assert elements("1,2") is None


@given(st.text(max_size=40))
def test_no_text_makes_a_verifier_raise(text: str) -> None:
    assert accepted_by(text, text) == "text"
    rational(text)
    elements(text)
    same_value(tidy(text), "1")
