r"""Do two LaTeX expressions denote the same function? Tried at random points.

Two expressions built from + - * / ^, roots, logarithms and trigonometry that agree at a few
random points are the same, with overwhelming probability (Schwartz, 1980, for polynomials).
That costs microseconds where symbolic simplification costs milliseconds, and complex floats
cannot grow: 9^{9^9} overflows at once and counts as no value.

What the small grammar below does not know (intervals, matrices, sets) has no value here and
is left to math-verify.
"""

from __future__ import annotations

import cmath
import math
import random
import re
from collections.abc import Callable
from functools import lru_cache

_TOKEN = re.compile(
    r"\s*(?:(\d+(?:\.\d+)?|\.\d+)|\\(times|div|[a-zA-Z]+|[{}|])|([a-zA-Z](?:_(?:\w|\{\w+\}))?)|(.))"
)
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "ln": cmath.log, "log": cmath.log,
    "exp": cmath.exp, "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh,
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan,
    "sec": lambda z: 1 / cmath.cos(z), "csc": lambda z: 1 / cmath.sin(z),
    "cot": lambda z: 1 / cmath.tan(z),
}  # fmt: skip
_GREEK = frozenset(
    ["alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega", "sigma", "rho"]
)
_POINTS = 3
_MAX_DEPTH = 40
_MAX_DIGITS = 15  # of a number; double precision holds no more
# Double precision loses about 4 of 16 digits in the expressions of answer size.
_TOLERANCE = 1e-11
# A term so much smaller than another one is not seen in the sum: 2^{100} - 1 is not 2^{100}.
_UNSEEN = 1e-9
_DIFFERENT = 1e-5


class _NoValueError(Exception):
    """The text is outside the grammar, or has no finite value."""


def same_value(first: str, second: str) -> bool | None:
    """Whether two expressions (tidied LaTeX) have the same values.

    Returns:
        True when they agree at every point tried, False when they clearly differ at one,
        None when either is outside the grammar or the values are too close to tell.
    """
    close = True
    try:
        for point in range(_POINTS):
            a, b = _Parser(first, point).value(), _Parser(second, point).value()
            difference, scale = abs(a - b), max(abs(a), abs(b))
            if difference > _DIFFERENT * max(scale, 1.0):
                return False
            close = close and difference <= _TOLERANCE * scale
    except (_NoValueError, ArithmeticError, ValueError, RecursionError):
        return None
    return True if close else None


@lru_cache(maxsize=4096)
def _value_of(name: str, point: int) -> float:
    """A value of its own for every name, the same in both expressions.

    Irrational-looking, so that accidental agreement is as good as impossible; positive, since a
    square root in an answer usually means a real one.
    """
    return random.Random(f"{name} at {point}").uniform(0.5, 2.0)


def _added(first: complex, second: complex) -> complex:
    small, large = sorted((abs(first), abs(second)))
    if 0.0 < small < _UNSEEN * large:
        raise _NoValueError
    return first + second


class _Parser:
    """Recursive descent over LaTeX tokens, computing with the values of variables at `point`."""

    def __init__(self, text: str, point: int) -> None:
        self._tokens = [
            (kind, token)
            for match in _TOKEN.finditer(text.strip())
            for kind, token in zip("ncvs", match.groups(), strict=True)
            if token is not None
        ]
        self._position = 0
        self._depth = 0
        self._point = point

    def value(self) -> complex:
        result = self._sum()
        if self._position != len(self._tokens) or not cmath.isfinite(result):
            raise _NoValueError
        return result

    def _peek(self) -> tuple[str, str]:
        if self._position < len(self._tokens):
            return self._tokens[self._position]
        return ("", "")

    def _take(self, token: str) -> bool:
        if self._peek()[1] == token and self._peek()[0] != "v":
            self._position += 1
            return True
        return False

    def _expect(self, token: str) -> None:
        if not self._take(token):
            raise _NoValueError

    def _sum(self) -> complex:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _NoValueError
        result = self._product()
        while True:
            if self._take("+"):
                result = _added(result, self._product())
            elif self._take("-"):
                result = _added(result, -self._product())
            else:
                self._depth -= 1
                return result

    def _product(self) -> complex:
        result = self._signed()
        while True:
            if self._take("times") or self._take("*"):
                result *= self._signed()
            elif self._take("/") or self._take("div"):
                result /= self._signed()
            elif self._starts_factor():
                result *= self._power()
            else:
                return result

    def _signed(self) -> complex:
        if self._take("-"):
            return -self._signed()
        if self._take("+"):
            return self._signed()
        return self._power()

    def _starts_factor(self) -> bool:
        kind, token = self._peek()
        known = token in _FUNCTIONS or token in _GREEK or token in ("frac", "sqrt", "pi")
        # Two numbers side by side are no product: 3 1/2 means something else.
        return kind == "v" or (kind == "c" and known) or (kind == "s" and token in "({")

    def _power(self) -> complex:
        base = self._atom()
        while self._take("!"):
            if base.imag or base.real < 0 or base.real != int(base.real) or base.real > 170:
                raise _NoValueError
            base = complex(math.factorial(int(base.real)))
        if self._take("^"):
            exponent = self._group()
            return base**exponent
        return base

    def _group(self) -> complex:
        """What stands in braces, or one digit, letter or command after ^."""
        if self._take("{"):
            result = self._sum()
            self._expect("}")
            return result
        kind, token = self._peek()
        if kind == "n" and len(token) > 1:  # x^12 without braces is (x^1)2 in LaTeX
            raise _NoValueError
        return self._atom()

    def _atom(self) -> complex:
        kind, token = self._peek()
        self._position += 1
        if kind == "n":
            if len(token) > _MAX_DIGITS:
                raise _NoValueError
            return complex(float(token))
        if kind == "v":
            return self._variable(token)
        if kind == "s" and token in "({":
            result = self._sum()
            self._expect(")" if token == "(" else "}")
            return result
        if kind == "s" and token == "|":
            result = self._sum()
            self._expect("|")
            return complex(abs(result))
        if kind != "c":
            raise _NoValueError
        if token == "pi":
            return complex(math.pi)
        if token in _GREEK:
            return self._variable(token)
        if token == "frac":
            return self._group() / self._group()
        if token == "sqrt":
            return self._root()
        if token in _FUNCTIONS:
            return self._function(token)
        raise _NoValueError

    def _variable(self, name: str) -> complex:
        if name == "i":
            return 1j
        if name == "e":
            return complex(math.e)
        return complex(_value_of(name.replace("{", "").replace("}", ""), self._point))

    def _root(self) -> complex:
        degree = complex(2)
        if self._take("["):
            degree = self._sum()
            self._expect("]")
        radicand = self._group()
        if degree == 3 and radicand.imag == 0 and radicand.real < 0:
            return complex(-((-radicand.real) ** (1 / 3)))
        return radicand ** (1 / degree)

    def _function(self, name: str) -> complex:
        function = _FUNCTIONS[name]
        if name == "log":  # without a base it is ln to some and log10 to others
            self._expect("_")
            base = self._group()
            return cmath.log(self._argument()) / cmath.log(base)
        if self._take("^"):
            exponent = self._group()
            if exponent == -1:  # sin^{-1} is the inverse function to some, 1/sin to others
                raise _NoValueError
            return function(self._argument()) ** exponent
        return function(self._argument())

    def _argument(self) -> complex:
        """A bracketed group, or the factors up to the next operator: sin 2x."""
        kind, token = self._peek()
        if kind == "s" and token in "({":
            return self._atom()
        result = self._power()
        while self._peek()[0] == "v":
            result *= self._power()
        return result
