r"""Mathematics: is the last \boxed{...} the gold answer? Binary (ProRL, appendix D).

Three verifiers, cheapest first; the answer is right if any accepts: the same text after
normalisation, the same number or the same values (our check, in the place of DeepScaleR's
mathd and sympy), and math-verify. math-verify sees only what the others could not decide and
only tame text, because it can hang or take gigabytes on the rest.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import re
from functools import lru_cache
from types import ModuleType
from typing import Any

from prorl_nemo.rewards.extraction import final_part, last_box
from prorl_nemo.rewards.latex_text import canonical, elements, rational, tidy
from prorl_nemo.rewards.latex_value import same_value
from prorl_nemo.rewards.verdict import GradingError, Verdict, zero

# Gold answers of MATH, AMC, AIME and Olympiad sets stay far below.
MAX_ANSWER = 400
_MAX_DEPTH = 15  # math-verify's grammar takes seconds on deep nests
_DECIMALS, _DIGITS = 10, 15
_TINY = 4  # noughts after the point from which on ten decimals are too few
# What a gold answer with more than one member, or that stands for an interval, contains.
_SEVERAL = re.compile(r"[,;<>]|\\(?:cup|pm|mp|le|ge|leq|geq|in|begin|infty|mathbb)(?![a-zA-Z])")
_BASE = re.compile(r"\(?[0-9A-Z]*\d[0-9A-Z]*\)?_\{?(\d+)\}?")
_SHAPES = (
    r"\frac{1}{3} + x", r"\sqrt{2}", r"x^2 - 3x", r"(3, \frac{\pi}{2})", r"\{1, 2\}", r"2x = 3",
    r"(-\infty, 2) \cup [3, 4]", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"x \ge 2", r"\text{a}",
    r"\sin x", r"1 \pm \sqrt{19}", r"10^{5}", r"2i", r"12_5", "5!", r"\log_2 3", r"\binom{5}{2}",
)  # fmt: skip
# Computing these can hang; an answer that leaves them uncomputed is not an answer.
_UNFINISHED = re.compile(r"\\(?:sum|prod|int|oint|iint|lim)(?![a-zA-Z])")
_LONG_EXPONENT = re.compile(r"(?:\^|\*\*)\s*[({]*\s*[+-]?\s*\d{5,}")
_TOWER = re.compile(r"\^[^+\-=,]{0,40}\^|\*\*[^+\-=,]{0,40}\*\*")
_LONG_FACTORIAL = re.compile(r"\d{4,}\s*[)}]*\s*!|!\s*[)}]*\s*!")
_LONG_BINOMIAL = re.compile(r"\\[dt]?binom[^a-zA-Z]{0,12}\d{4,}")


def grade(grading: dict[str, Any], text: str, training: bool = True) -> Verdict:
    r"""Score 1 if the response's last box holds the gold answer, else 0.

    Args:
        grading: `answer`: the gold answer as LaTeX without a box, or a number, or a list of
            answers of which any is right.
        text: the response; without \boxed{...} after the thinking it scores 0.
        training: makes no difference.

    Raises:
        GradingError: no gold answer.
    """
    golds = gold_answers(grading)
    answer = last_box(final_part(text, grading))
    if answer is None:
        return zero(r"no answer: no closed \boxed{...} after the thinking")
    if not answer:
        return zero(r"no answer: the box is empty")
    if len(answer) > MAX_ANSWER:
        return zero(f"refused: the answer has {len(answer)} characters, {MAX_ANSWER} are allowed")
    for gold in golds:
        verifier = accepted_by(gold, answer)
        if verifier:
            return Verdict(1.0, {"answer": answer, "verifier": verifier}, "correct")
    return zero(f"wrong: {answer[:80]!r}", answer=answer)


def gold_answers(grading: dict[str, Any]) -> list[str]:
    """The gold answers of a record, as text. Raises GradingError without one."""
    answer = grading.get("answer")
    golds = answer if isinstance(answer, list) else [answer]
    for gold in golds:
        if not isinstance(gold, str | int | float) or isinstance(gold, bool) or gold == "":
            raise GradingError(f"grading.answer: {gold!r} is no gold answer; give text or a number")
    if not golds:
        raise GradingError("grading.answer: the list of gold answers is empty")
    return [str(gold) for gold in golds]


def accepted_by(gold: str, answer: str) -> str | None:
    """Which verifier takes `answer` for `gold`: text, value, math_verify, or None."""
    if _same_text(gold, answer):
        return "text"
    same = _same(gold, answer)
    if same is None and not hostile(tidy(answer)) and _math_verify(gold, answer):
        return "math_verify"
    return "value" if same else None


def _same_text(gold: str, answer: str) -> bool:
    # The keys of 3 1/2 and 31/2 are one; their values are not.
    return canonical(answer) == canonical(gold) and rational(answer) == rational(gold)


def _same(gold: str, answer: str) -> bool | None:
    """Our own verdict; None where math-verify has to decide."""
    base, gold_base = (_BASE.fullmatch(canonical(text)) for text in (answer, gold))
    if base and gold_base and base[1] != gold_base[1]:
        return False  # math-verify ignores the base of 2516_8
    number, gold_number = rational(answer), rational(gold)
    if number is not None and gold_number is not None:
        return number == gold_number
    ours, theirs = elements(gold), elements(answer)
    if ours and theirs and ours[0] == theirs[0] and len(ours[1]) == len(theirs[1]):
        pairs = [_same_text(a, b) or _same(a, b) for a, b in zip(ours[1], theirs[1], strict=True)]
        if all(pairs):
            return True
        ordered = ours[0] not in ("\\{\\}", "[]")
        return False if ordered and any(pair is False for pair in pairs) else None
    if theirs and not _SEVERAL.search(gold):
        return False  # several members for a single answer
    same = same_value(tidy(gold), tidy(answer))
    # 1.41421356237 is not the square root of 2: math-verify decides on roundings.
    return None if same and "." in answer else same


def hostile(answer: str) -> bool:
    """Whether computing the answer could take very long or much memory."""
    return _depth(answer) > _MAX_DEPTH or any(
        pattern.search(answer)
        for pattern in (_UNFINISHED, _LONG_EXPONENT, _TOWER, _LONG_FACTORIAL, _LONG_BINOMIAL)
    )


def _depth(text: str) -> int:
    """How deeply brackets are nested, unclosed ones included."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _math_verify(gold: str, answer: str) -> bool:
    parsed, expected = _parse(tidy(answer)), _parse_gold(gold)
    more = _more_decimals([*parsed, *expected])
    # No timeouts of its own: they are SIGALRM, which the worker needs for its soft limit.
    return bool(parsed) and _library().verify(
        expected,
        parsed,
        # The default 6 takes 3.141593 for pi.
        float_rounding=_DECIMALS + more,
        numeric_precision=_DIGITS + more,
        allow_set_relation_comp=True,
        timeout_seconds=None,
    )


def _more_decimals(parsed: list[Any]) -> int:
    """What tiny values need beyond the usual: 6.6e-34 J and 1.6e-19 J would both round to 0."""
    noughts = [0]
    for expression in parsed:
        # What sympy cannot evaluate is left to the verifier, which catches its own failures.
        with contextlib.suppress(Exception):
            size = abs(expression.evalf(5))
            if size.is_Float and 0 < size < 1:
                noughts.append(-math.floor(math.log10(size)))
    return max(0, max(noughts) - _TINY)


@lru_cache(maxsize=8192)
def _parse_gold(gold: str) -> list[Any]:
    return _parse(tidy(gold))


def _parse(latex: str) -> list[Any]:
    """math-verify's reading of one expression; only LaTeX, which is never evaluated as code."""
    library = _library()
    config = [library.LatexExtractionConfig(boxed_match_priority=0)]
    text = rf"\boxed{{{latex}}}"
    parsed: list[Any] = library.parse(text, extraction_config=config, parsing_timeout=None)
    return parsed


@lru_cache(maxsize=1)
def _library() -> ModuleType:
    # It warns, for each process, that its timeouts are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return importlib.import_module("math_verify")


def warm_up() -> None:
    """Import the libraries and build the parser's tables, before workers are forked."""
    # The parser learns its tables as it reads: one expression of every common shape.
    for latex in _SHAPES:
        _math_verify(latex, latex + "+1")
