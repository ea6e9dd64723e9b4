"""Working: the steps before an answer, for tasks where a few short steps help.

Reasoning Gym gives answers without steps. These are our own, as short as they can be, from an
item's metadata. Where there is none the answer stands alone, as it does for a share of all
problems: so responses differ in length, and RL has something to choose.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

# Longer working than this many steps is no help to a response limit of some dozen tokens.
_MOST_STEPS = 8


def working(task: str, metadata: dict[str, Any]) -> str | None:
    """Steps that lead to an item's answer, or None: the task has none, or too many."""
    steps = _WRITERS[task](metadata) if task in _WRITERS else []
    return " ".join(steps) if 0 < len(steps) <= _MOST_STEPS else None


def _chain_sum(metadata: dict[str, Any]) -> list[str]:
    """Sums from left to right."""
    first, *rest = metadata["expression"].split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total}{sign}{term}={after}")
        total = after
    return steps


def _products(metadata: dict[str, Any]) -> list[str]:
    """The second factor digit by digit, from the highest, and sums of what that gives."""
    a, b = (int(factor) for factor in metadata["expression"].split(" * "))
    digits = [int(digit) * 10**place for place, digit in enumerate(str(b)[::-1])][::-1]
    steps = [f"{a}*{part}={a * part}" for part in digits]
    total = a * digits[0]
    for part in digits[1:]:
        steps.append(f"{total}+{a * part}={total + a * part}")
        total += a * part
    return steps


def _gcd(metadata: dict[str, Any]) -> list[str]:
    """Euclid's remainders, of two numbers."""
    if len(metadata["numbers"]) != 2:
        return []
    a, b = sorted(metadata["numbers"], reverse=True)
    steps = []
    while b:
        steps.append(f"{a}%{b}={a % b}")
        a, b = b, a % b
    return steps


def _fraction_simplification(metadata: dict[str, Any]) -> list[str]:
    """Both parts divided by their greatest common divisor."""
    by = metadata["reduction_factor"]
    return [
        f"{metadata[part]}/{by}={metadata[f'simplified_{part}']}"
        for part in ("numerator", "denominator")
    ]


def _simple_equations(metadata: dict[str, Any]) -> list[str]:
    """The constant brought to the other side, of equations like 3*x + 4 = 10."""
    form = re.fullmatch(r"(\d+\*\w) ([+-]) (\d+) = (-?\d+)", metadata["equation"])
    if not form:
        return []
    term, sign, constant, value = form.groups()
    other = int(value) - int(constant) if sign == "+" else int(value) + int(constant)
    return [f"{term}={other}"]


def _simple_geometry(metadata: dict[str, Any]) -> list[str]:
    """The known angles' sum, and what is left."""
    angles = [round(angle) for angle in metadata["known_angles"]]
    total, all_of_it = math.fsum(angles), metadata["total_interior_sum"]
    written = "+".join(map(str, angles))
    return [f"{written}={total:.0f}", f"{all_of_it}-{total:.0f}={all_of_it - total:.0f}"]


def _number_sequence(metadata: dict[str, Any]) -> list[str]:
    """The differences of the terms shown."""
    shown = metadata["sequence"][:-1]
    return [str(after - before) for before, after in pairwise(shown)]


_WRITERS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "chain_sum": _chain_sum,
    "products": _products,
    "gcd": _gcd,
    "fraction_simplification": _fraction_simplification,
    "simple_equations": _simple_equations,
    "simple_geometry": _simple_geometry,
    "number_sequence": _number_sequence,
    "count_bits": lambda m: [" ".join(m["binary"])],
    "base_conversion": lambda m: [str(m["decimal_value"])],
    "count_primes": lambda m: [str(prime) for prime in m["primes"]],
}
