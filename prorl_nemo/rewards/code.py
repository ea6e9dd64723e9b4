"""Code: the share of tests that the submitted program passes (ProRL, appendix D).

Training rewards the share of all tests, evaluation all or nothing; more than `time_limit_s`
of processor time for all tests together scores 0. The program runs in a box (`sandbox`)
that is told the inputs only. Outputs are compared here, as plain data, so that a program
cannot read what is expected, nor return an object that equals everything.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
import select
import socket
import time
from dataclasses import dataclass
from typing import Any

from prorl_nemo.rewards.extraction import final_part, last_code_block
from prorl_nemo.rewards.sandbox import runner
from prorl_nemo.rewards.sandbox.box import Box, CompileError, Run
from prorl_nemo.rewards.sandbox.probe import working_backend
from prorl_nemo.rewards.verdict import GradingError, Verdict, zero

TIME_LIMIT_S = 5.0
MEMORY_LIMIT_MIB = 1024
MAX_SOURCE = 200_000
_COMPILE_S = 30.0
_MAX_CALLS = 20_000
_LANGUAGES = {
    **dict.fromkeys(("", "python", "python3", "py", "py3"), "python"),
    **dict.fromkeys(("cpp", "c++", "cc", "cxx", "c", "cpp17", "c++17"), "cpp"),
}
_STATUS = {
    runner.FAILED: "run-time error",
    runner.TIMED_OUT: "timed out",
    runner.TOO_MUCH_OUTPUT: "too much output",
}


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


def grade(grading: dict[str, Any], text: str, training: bool = True) -> Verdict:
    """Run the last code block of a response on the record's tests.

    Args:
        grading: one of
            `tests` of {input, output} texts: a program from standard input to output;
            `entry_point` and `tests` of {input: [arguments], output: value}: a function;
            `entry_point`, `checks` (test programs in Python, which raise if the function is
            wrong) and optionally `setup` (what they need to be defined).
            Optional: `language` (python or cpp; default: what the block's fence says),
            `time_limit_s`, `memory_limit_mib`.
        text: the response.
        training: the share of tests passed; otherwise 1 for all of them, else 0.

    Raises:
        GradingError: the record has no usable tests.
        SandboxError: no sandbox works here.
    """
    tests = read_tests(grading)
    block = last_code_block(final_part(text, grading))
    if block is None:
        return zero("no answer: no code block after the thinking")
    fence, source = block
    language = tests.language or _LANGUAGES.get(fence)
    if language is None:
        return zero(f"no answer: a code block in {fence!r}, which is not graded")
    if not source.strip():
        return zero("no answer: the code block is empty")
    if len(source) > MAX_SOURCE:
        return zero(f"refused: {len(source)} characters of code, {MAX_SOURCE} are allowed")
    if language == "cpp" and not tests.programs:
        return zero("no answer: function-style tasks are graded in Python")
    try:
        passed, total, reason = _run_tests(tests, language, source, stop_early=not training)
    except CompileError as error:
        return zero(f"compile error: {_one_line(str(error))}", passed=0)
    share = passed / total
    score = share if training else float(passed == total)
    parts = {"passed": passed, "tests": total, "language": language}
    return Verdict(score, parts, "correct" if passed == total else reason)


def extra_seconds(grading: dict[str, Any]) -> float:
    """What a grading may take beyond the pool's limits: compiling and running."""
    return _COMPILE_S + 2 * _wall(_number(grading, "time_limit_s", TIME_LIMIT_S))


def _wall(cpu_s: float) -> float:
    """Wall time for `cpu_s` of processor time: a busy machine must not cost a right program."""
    return 2 * cpu_s + 2


class _OutOfTimeError(Exception):
    """All tests together took longer than allowed: the score is 0, not the share."""


def _run_tests(
    tests: Cases, language: str, source: str, *, stop_early: bool
) -> tuple[int, int, str]:
    """(tests passed, tests, reason for the first failure). Raises CompileError."""
    total = len(tests.programs) + len(tests.calls) + len(tests.checks)
    mode = "program" if tests.programs else "call"
    passed, reason = 0, ""
    clock = _Clock(tests.time_limit_s)
    with Box(working_backend(), source, language, mode, memory_mib=tests.memory_mib) as box:
        try:
            for number in range(total):
                failure = _failure(tests, number, box, clock)
                passed += failure is None
                if failure is not None and not reason:
                    reason = f"{failure} (test {number + 1} of {total})"
                if failure is not None and stop_early:
                    break
        except _OutOfTimeError:
            limit = f"{tests.time_limit_s:g} s for all tests"
            return 0, total, f"timed out: {limit}"
    return passed, total, reason


class _Clock:
    """Processor and wall time that the tests of a submission may still use."""

    def __init__(self, cpu_s: float) -> None:
        self.cpu = cpu_s
        self._end = time.monotonic() + _wall(cpu_s)

    @property
    def wall(self) -> float:
        return max(0.05, self._end - time.monotonic())

    def charge(self, run: Run) -> None:
        self.cpu -= run.cpu
        if run.status == runner.TIMED_OUT or self.cpu <= 0 or time.monotonic() > self._end:
            raise _OutOfTimeError


def _failure(tests: Cases, number: int, box: Box, clock: _Clock) -> str | None:
    """Why a test fails, or None if it passes."""
    if tests.checks:
        return _failed_check(tests, tests.checks[number], box, clock)
    if tests.programs:
        stdin, expected = tests.programs[number]
        run = box.run(stdin, clock.cpu, clock.wall)
        clock.charge(run)
        if run.status != runner.FINISHED:
            return _describe(run)
        return None if same_output(run.output, expected) else "wrong output"
    arguments, value = tests.calls[number]
    run = box.run(_request(tests.entry_point, arguments), clock.cpu, clock.wall)
    clock.charge(run)
    if run.status != runner.FINISHED:
        return _describe(run)
    try:
        returned = runner.decode(json.loads(run.output))
    except (ValueError, TypeError, RecursionError):
        return "run-time error: no result"
    return None if same_value(returned, value) else "wrong result"


def _describe(run: Run) -> str:
    kind = _STATUS.get(run.status, "run-time error")
    last = _one_line(run.messages) or (f"exit code {run.code}" if run.code else "")
    return f"{kind}: {last}" if last else kind


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[0][:160]


def _request(name: str, arguments: list[Any]) -> bytes:
    request = {"name": name, "args": [runner.encode(a) for a in arguments], "kwargs": {}}
    return json.dumps(request).encode()


def _failed_check(tests: Cases, check: str, box: Box, clock: _Clock) -> str | None:
    """Run test code in a box of its own; its calls of the function are relayed to `box`.

    The test code never shares an interpreter with the submission.
    """
    ours, theirs = socket.socketpair()
    source = f"{tests.setup}\n{_BIND}\n{check}\n"
    with ours, theirs:
        try:
            checker = Box(working_backend(), source, mode="check", checker=theirs)
        except CompileError as error:
            raise GradingError(f"grading.checks: {error}") from None
        with checker:
            wall = clock.wall
            checker.start(tests.entry_point.encode(), tests.time_limit_s, wall)
            broken = _relay(ours, checker, box, tests, clock)
            if broken:
                return broken
            run = checker.result(wall)
    if run.status == runner.FINISHED:
        return None
    if run.status == runner.TIMED_OUT:
        raise _OutOfTimeError
    return f"failed: {_one_line(run.messages)}"


# The data set's setup may define the function too (as the prompt's stub): ours wins.
_BIND = "globals().__setitem__(*__function_under_test__)"


def _relay(ours: socket.socket, checker: Box, box: Box, tests: Cases, clock: _Clock) -> str | None:
    """Answer the checker's calls until its run ends."""
    poll = select.poll()
    for sock in (ours, checker.control):
        poll.register(sock, select.POLLIN)
    for _ in range(_MAX_CALLS):
        ready = {descriptor for descriptor, _ in poll.poll(clock.wall * 1000)}
        if checker.control.fileno() in ready:
            return None
        if ours.fileno() not in ready:
            raise _OutOfTimeError
        with contextlib.suppress(OSError, EOFError):
            request = json.loads(_read_frame(ours, clock))
            answer = _answer(request, box, tests, clock)
            body = json.dumps(answer).encode()
            ours.settimeout(clock.wall)
            ours.sendall(len(body).to_bytes(4, "little") + body)
    return f"failed: more than {_MAX_CALLS} calls"


def _read_frame(sock: socket.socket, clock: _Clock) -> bytes:
    def read(size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            sock.settimeout(clock.wall)
            chunk = sock.recv(min(size - len(parts), 1 << 20))
            if not chunk:
                raise EOFError
            parts += chunk
        return bytes(parts)

    return read(int.from_bytes(read(4), "little"))


def _answer(request: dict[str, Any], box: Box, tests: Cases, clock: _Clock) -> dict[str, Any]:
    arguments = request["args"]["tuple"]
    call = {"name": tests.entry_point, "args": arguments, "kwargs": request["kwargs"]}
    run = box.run(json.dumps(call).encode(), clock.cpu, clock.wall)
    clock.charge(run)
    if run.status != runner.FINISHED:
        kind, _, text = run.messages.partition(" at line ")
        return {"error": kind if kind.isidentifier() else "RuntimeError", "text": text}
    try:
        value = json.loads(run.output)
        runner.decode(value)
    except (ValueError, TypeError, RecursionError):
        return {"error": "RuntimeError", "text": "no result"}
    return {"value": value}


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
        _number(grading, "time_limit_s", TIME_LIMIT_S),
        int(_number(grading, "memory_limit_mib", MEMORY_LIMIT_MIB)),
    )


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


def warm_up() -> None:
    """Choose the sandbox once, for all workers."""
    working_backend()
