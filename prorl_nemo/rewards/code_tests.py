"""The tests of a code record: programs, calls of a function, or test programs."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from prorl_nemo.rewards.verdict import GradingError

TIME_LIMIT_S = 5.0
MEMORY_LIMIT_MIB = 1024


@dataclass(frozen=True)
class Cases:
    """The tests of a record, read and checked. Exactly one of the three lists is filled."""

    programs: list[tuple[bytes, str]]
    calls: list[tuple[list[Any], Any]]
    checks: list[str]
    entry_point: str
    setup: str
    language: str | None
    time_limit_s: float
    memory_mib: int


def read_tests(grading: dict[str, Any]) -> Cases:
    """The tests of a record. Raises GradingError naming the key at fault."""
    entry_point, checks = grading.get("entry_point") or "", grading.get("checks") or []
    if entry_point and not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise GradingError(f"grading.entry_point: {entry_point!r} is no function name")
    programs: list[tuple[bytes, str]] = []
    calls: list[tuple[list[Any], Any]] = []
    if checks:
        if not entry_point or not all(isinstance(check, str) for check in checks):
            raise GradingError("grading.checks: must be Python texts, and need an `entry_point`")
    else:
        rows = grading.get("tests")
        if not isinstance(rows, list) or not rows:
            raise GradingError("grading.tests: must be a list with at least one test")
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or "input" not in row or "output" not in row:
                raise GradingError(f"grading.tests[{number}]: needs `input` and `output`")
            if entry_point:
                if not isinstance(row["input"], list):
                    raise GradingError(f"grading.tests[{number}].input: must list the arguments")
                calls.append((row["input"], row["output"]))
            else:
                if not (isinstance(row["input"], str) and isinstance(row["output"], str)):
                    raise GradingError(f"grading.tests[{number}]: input and output must be texts")
                programs.append((row["input"].encode("utf-8", "replace"), row["output"]))
    language = grading.get("language")
    if language not in (None, "python", "cpp"):
        raise GradingError(f"grading.language: {language!r}; use python or cpp")
    setup = str(grading.get("setup") or "")
    _check_python(setup, "setup")
    return Cases(
        programs,
        calls,
        list(checks),
        entry_point,
        setup,
        language,
        time_limit_s(grading),
        int(_number(grading, "memory_limit_mib", MEMORY_LIMIT_MIB)),
    )


def time_limit_s(grading: dict[str, Any]) -> float:
    """Processor time, in seconds, that all tests together may take. Raises GradingError."""
    return _number(grading, "time_limit_s", TIME_LIMIT_S)


def _check_python(text: str, key: str) -> None:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise GradingError(f"grading.{key}: is no Python: {error}") from None


def _number(grading: dict[str, Any], key: str, default: float) -> float:
    value = grading.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise GradingError(f"grading.{key}: {value!r} must be a positive number")
    return float(value)
