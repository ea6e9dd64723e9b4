r"""One spelling for a mathematical answer written in LaTeX.

Removes what does not change the meaning (spacing, \left, units, a name before the equals
sign) so that most right answers match the gold one as text. The conventions are those of
the MATH grading scripts that DeepScaleR, and so ProRL, trains with, restated as rules.
"""

from __future__ import annotations

import re
from fractions import Fraction

_UNICODE = str.maketrans(
    {
        **{"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi "},  # noqa: RUF001
        **{"√": r"\sqrt ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "},
        **{"∪": r"\cup ", "∩": r"\cap ", "°": r"^\circ", "θ": r"\theta ", "±": r"\pm "},  # noqa: RUF001
        **{"²": "^2", "³": "^3", "½": r"\frac{1}{2}", "\u00a0": " ", "％": "%"},  # noqa: RUF001
    }
)
_END = r"(?![a-zA-Z])"
_REWRITES = [
    # Mathematics mode and dollars; per cent is read as in MATH: 50\% is 50.
    (r"(?<!\\)\\[()\[\]]|\\?\$|\\?%", ""),
    (r"(?<=\d)(?:,\\!|\{,\}|\\,)(?=\d{3}(?!\d))", ""),
    (rf"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|q?quad){_END}", " "),
    (r"(?<!\\)\\[!,;:> ]|~", " "),
    (rf"\\[dtc]frac{_END}", r"\\frac"),
    (rf"\\(?:leq|leqslant){_END}", r"\\le"),
    (rf"\\(?:geq|geqslant){_END}", r"\\ge"),
    (rf"\\neq{_END}", r"\\ne"),
    (rf"\\(?:cdot|ast){_END}", r"\\times"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", ""),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
]
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _REWRITES]
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
_BRACKETS = (("(", ")"), ("[", "]"), (r"\{", r"\}"))
_WORDS = re.compile(
    r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}"
)
_UNIT = re.compile(
    r"(?<=[\d})])\s*(?:square |cubic )?"
    r"(?:units?|inch(?:es)?|in|feet|foot|ft|yards?|miles?|mph|met(?:er|re)s?|cm|mm|km|m|seconds?"
    r"|minutes?|hours?|days?|weeks?|months?|years?|dollars?|cents?|points?|people|students?"
    r"|pounds?|lbs?|ounces?|oz|grams?|kg|g|lit(?:er|re)s?|degrees?|ways?|percent)"
    r"\.?\s*(?:\^\{?[23]\}?)?\s*$"
)
_NAME = re.compile(r"^[a-zA-Z](?:_\{?\w\}?|\([a-zA-Z]\))?\s*(?:=|\\in(?![a-zA-Z]))(?!.*=)")

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(rf"[+-]?{_DECIMAL}")
_QUOTIENT = re.compile(r"([+-]?)(?:\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}|(\d+)/(\d+))")
_MIXED = re.compile(r"([+-]?)(\d+)(?:\s*\\frac\{(\d+)\}\{(\d+)\}|\s+(\d+)/(\d+))")
_SCIENTIFIC = re.compile(
    rf"([+-]?{_DECIMAL})\s*(?:[eE]|\\times\s*10\s*\^)\s*\{{?([+-]?\d{{1,3}})\}}?"
)
_MAX_LENGTH = 400


def tidy(answer: str) -> str:
    """The answer with one way of writing each thing; still LaTeX."""
    text = answer.translate(_UNICODE)
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    text = _THOUSANDS.sub(_joined, text).strip()
    without_words = _WORDS.sub(r" \1 ", text).strip().rstrip(".")
    without_unit = _UNIT.sub("", without_words).strip()
    if without_unit != without_words:
        text = without_unit
    named = _NAME.match(text)
    if named:
        text = text[named.end() :]
    return text.strip().rstrip(".").strip()


def _joined(digits: re.Match[str]) -> str:
    """1,234 as 1234; but (3,100) is a pair, unless a blank tells its members apart."""
    text, before = digits.string, digits.string[: digits.start()]
    bracketed = any(before.count(a) > before.count(b) for a, b in _BRACKETS)
    apart = bracketed and not re.search(r",\s", text)
    return digits[0].replace(",", ", " if apart else "")


def canonical(answer: str) -> str:
    """A key: two answers with the same key are the same. Case counts except in words."""
    text = _WORDS.sub(r"\1", tidy(answer))
    text = re.sub(r"\s+", "", text)
    text = re.sub(r"(?<![\w.}])\.(?=\d)", "0.", text)
    text = re.sub(r"(?<![\d.])(\d+)\.0+(?!\d)", r"\1", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"^\((\w)\)$", r"\1", text)
    return text.casefold() if re.fullmatch(r"[a-zA-Z]{2,}", text) else text


def rational(answer: str) -> Fraction | None:
    """The exact value of an integer, decimal, fraction, mixed or scientific number."""
    if len(answer) > _MAX_LENGTH:
        return None
    text = tidy(answer)
    if mixed := _MIXED.fullmatch(text):
        sign, whole, *parts = mixed.groups()
        top, bottom = (int(part) for part in parts if part is not None)
        return _signed(sign, int(whole), top, bottom)
    text = re.sub(r"\s+", "", text)
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    if quotient := _QUOTIENT.fullmatch(text):
        sign, *parts = quotient.groups()
        top, bottom = (int(part) for part in parts if part is not None)
        return _signed(sign, 0, top, bottom)
    if scientific := _SCIENTIFIC.fullmatch(text):
        return Fraction(scientific[1]) * Fraction(10) ** int(scientific[2])
    return None


def elements(answer: str) -> tuple[str, list[str]] | None:
    """Brackets and members of a tuple, interval or set such as (3, 5]; None for anything else."""
    text = tidy(answer)
    ends = re.fullmatch(r"(\(|\[|\\\{)(.*?)(\)|\]|\\\})", text, re.DOTALL)
    if not ends:
        return None
    members, depth, start = [], 0, 0
    inside = ends[2]
    for position, character in enumerate(inside):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None  # (a)(b) is a product
        if character == "," and depth == 0:
            members.append(inside[start:position])
            start = position + 1
    members.append(inside[start:])
    return (ends[1] + ends[3], members) if len(members) > 1 else None


def _signed(sign: str, whole: int, top: int, bottom: int) -> Fraction | None:
    if bottom == 0:
        return None
    value = whole + Fraction(top, bottom)
    return -value if sign == "-" else value
