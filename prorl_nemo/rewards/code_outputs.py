"""Is a program's output, or a function's result, the expected one?"""

from __future__ import annotations

import math
import re
from typing import Any


def same_output(output: bytes, expected: str) -> bool:
    """Compare standard output as contest judges do.

    Equal line by line without trailing blanks; or equal token by token, where a token with a
    decimal point may differ by 1e-6 (absolute or relative).
    """
    try:
        given = output.decode()
    except UnicodeDecodeError:
        return False
    if [line.rstrip() for line in given.rstrip().splitlines()] == [
        line.rstrip() for line in expected.rstrip().splitlines()
    ]:
        return True
    tokens, wanted = given.split(), expected.split()
    return len(tokens) == len(wanted) and all(
        a == b or _close_numbers(a, b) for a, b in zip(tokens, wanted, strict=True)
    )


_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")


def _close_numbers(given: str, expected: str) -> bool:
    if "." not in expected and "e" not in expected.lower():
        return False
    if not (_DECIMAL.fullmatch(given) and _DECIMAL.fullmatch(expected)):
        return False
    return math.isclose(float(given), float(expected), rel_tol=1e-6, abs_tol=1e-6)


def same_value(returned: Any, expected: Any) -> bool:
    """Compare plain values: tuples equal lists, floats may differ by 1e-6.

    `expected` comes from JSON, which knows neither tuples nor keys that are no text.
    """
    if isinstance(returned, bool) or isinstance(expected, bool):
        return returned is expected
    if isinstance(returned, int) and isinstance(expected, int):
        return returned == expected
    if isinstance(returned, int | float) and isinstance(expected, int | float):
        try:
            return math.isclose(returned, expected, rel_tol=1e-6, abs_tol=1e-6)
        except OverflowError:
            return False
    if isinstance(returned, list | tuple) and isinstance(expected, list | tuple):
        return len(returned) == len(expected) and all(
            same_value(a, b) for a, b in zip(returned, expected, strict=True)
        )
    if isinstance(returned, dict) and isinstance(expected, dict):
        named = {str(key): value for key, value in returned.items()}
        return (
            len(named) == len(returned)
            and named.keys() == expected.keys()
            and all(same_value(named[key], value) for key, value in expected.items())
        )
    if isinstance(returned, set | frozenset) and isinstance(expected, list):
        return sorted(map(repr, returned)) == sorted(map(repr, expected))
    return type(returned) is type(expected) and bool(returned == expected)
