"""Code: the share of tests that the submitted program passes (ProRL, appendix D).

Training rewards the share of all tests, evaluation all or nothing; more than `time_limit_s`
of processor time for all tests together scores 0. The program runs in a box (`sandbox`)
that is told the inputs only. Outputs are compared outside of it (`code_outputs`), as plain data,
so that a program cannot read what is expected, nor return an object that equals everything.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from typing import Any

from prorl_nemo.rewards.code_outputs import same_output, same_value
from prorl_nemo.rewards.code_tests import Cases, read_tests, time_limit_s
from prorl_nemo.rewards.extraction import final_part, last_code_block
from prorl_nemo.rewards.frames import receive_frame, send_frame
from prorl_nemo.rewards.sandbox import runner
from prorl_nemo.rewards.sandbox.box import Box, CompileError, Run
from prorl_nemo.rewards.sandbox.probe import working_backend
from prorl_nemo.rewards.verdict import GradingError, Verdict, zero

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
    return _COMPILE_S + 2 * _wall(time_limit_s(grading))


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
            request = receive_frame(ours, time.monotonic() + clock.wall)
            answer = _answer(request, box, tests, clock)
            send_frame(ours, answer, time.monotonic() + clock.wall)
    return f"failed: more than {_MAX_CALLS} calls"


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


def warm_up() -> None:
    """Choose the sandbox once, for all workers."""
    working_backend()
