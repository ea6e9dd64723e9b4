r"""Multiple choice (GPQA, SuperGPQA, lettered STEM): is the last \boxed{...} the right letter?

The paper does not publish its matcher. Our choice: a letter on its own, or the text of
exactly one choice. STEM questions with open answers are graded as `math`.
"""

from __future__ import annotations

import re
from typing import Any

from prorl_nemo.rewards.extraction import final_part, last_box
from prorl_nemo.rewards.math import accepted_by
from prorl_nemo.rewards.verdict import GradingError, Verdict, zero

_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_LETTER = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s*:?\s*)?[(\[]?([A-Za-z])[)\]]?(?:[.):].*)?", re.DOTALL
)
MAX_ANSWER = 1000


def grade(grading: dict[str, Any], text: str, training: bool = True) -> Verdict:
    r"""Score 1 for the right choice, else 0.

    Args:
        grading: `answer` (a letter) and optionally `choices` (their texts, A first).
        text: the response; without \boxed{...} after the thinking it scores 0.
        training: makes no difference.

    Raises:
        GradingError: no letter, or one beyond the choices.
    """
    gold, choices = _record(grading)
    answer = last_box(final_part(text, grading), MAX_ANSWER)
    if not answer:
        return zero(r"no answer: no closed \boxed{...} after the thinking")
    letter = chosen_letter(answer, choices)
    if letter is None:
        return zero(f"no answer: {answer[:80]!r} is no choice", answer=answer)
    if letter == gold:
        return Verdict(1.0, {"answer": letter}, "correct")
    return zero(f"wrong: {letter}", answer=letter)


def chosen_letter(answer: str, choices: list[str]) -> str | None:
    """The letter that the content of a box names, upper case, or None."""
    plain = _WRAPPED.sub(r"\1", answer).replace("$", "").strip().rstrip(".")
    letter = _LETTER.fullmatch(plain)
    if letter and not _beyond(letter[1], choices):
        return letter[1].upper()
    same = [i for i, choice in enumerate(choices) if _same_text(choice, answer)]
    return chr(ord("A") + same[0]) if len(same) == 1 else None


def _beyond(letter: str, choices: list[str]) -> bool:
    return bool(choices) and ord(letter.upper()) - ord("A") >= len(choices)


def _same_text(choice: str, answer: str) -> bool:
    return " ".join(choice.lower().split()) == " ".join(answer.lower().split()) or bool(
        accepted_by(choice, answer)
    )


def _record(grading: dict[str, Any]) -> tuple[str, list[str]]:
    gold, choices = grading.get("answer"), grading.get("choices") or []
    if not (isinstance(gold, str) and re.fullmatch(r"[A-Za-z]", gold)):
        raise GradingError(f"grading.answer: {gold!r} is no letter")
    if not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        raise GradingError("grading.choices: must be a list of texts")
    if _beyond(gold, choices):
        raise GradingError(f"grading.answer: {gold} is beyond the {len(choices)} choices")
    return gold.upper(), choices


def warm_up() -> None:
    """Import what choices are compared with, before workers are forked."""
    accepted_by(r"\frac{1}{3} + x", r"\{x\}")
