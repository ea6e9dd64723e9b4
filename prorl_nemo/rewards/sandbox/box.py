"""One submission in its box: prepared once, run once per test, gone afterwards."""

from __future__ import annotations

import contextlib
import marshal
import signal
import socket
import time
from dataclasses import dataclass
from typing import Any

from prorl_nemo.rewards.frames import receive_bytes
from prorl_nemo.rewards.sandbox import SandboxError, runner, seccomp
from prorl_nemo.rewards.sandbox.backends import Backend, start

MAX_OUTPUT = 8 << 20  # bytes; the longest expected outputs of contest problems are some 2 MB
_START_S = 60.0
_COMPILE_CPU_S, _COMPILE_WALL_S = 10.0, 30.0
_COMPILE_MEMORY = 2 << 30
_COMPILE_FILE = 64 << 20
_SLACK_S = 5.0
# ONLINE_JUDGE is what contest solutions test to keep their debugging files away.
_COMPILER = ["/usr/bin/g++", "-std=c++17", "-O2", "-pipe", "-w", "-DONLINE_JUDGE"]
_COMPILER += ["-fmax-errors=5", "-ftemplate-depth=512"]


class CompileError(Exception):
    """The submission cannot be compiled; the message is the compiler's."""


@dataclass(frozen=True)
class Run:
    """What one run did.

    Attributes:
        status: one of runner.FINISHED, FAILED, TIMED_OUT, TOO_MUCH_OUTPUT.
        code: exit code, negative for a signal.
        cpu: processor seconds.
        wall: seconds.
        output: bytes on standard output, or a function call's result.
        messages: the end of standard error.
    """

    status: int
    code: int
    cpu: float
    wall: float
    output: bytes
    messages: str


class Box:
    """A submission, prepared to run.

    Args:
        backend: how the box is closed.
        source: the program's text.
        language: `python` or `cpp`.
        mode: `program` (standard input to output), `call` (one function) or `check` (test
            code that asks for calls through `checker`).
        memory_mib: address space of a run.
        checker: in mode `check`, this end of the socket goes into the box.

    Raises:
        CompileError: the program does not compile.
        SandboxError: the box does not start here.
    """

    def __init__(
        self,
        backend: Backend,
        source: str,
        language: str = "python",
        mode: str = "program",
        *,
        memory_mib: int = 1024,
        checker: socket.socket | None = None,
    ) -> None:
        compiled = language == "cpp"
        self._launch = backend.prepare(compiled)
        ours, theirs = socket.socketpair()
        self._control = ours
        pass_fds = (checker.fileno(),) if checker else ()
        try:
            with theirs:
                self._process = start(self._launch, theirs.fileno(), pass_fds)
        except OSError as error:
            ours.close()
            self._launch.cleanup()
            raise SandboxError(f"sandbox {backend.name}: cannot start: {error}") from None
        try:
            self._prepare(backend.name, source, language, mode, memory_mib, checker)
        except BaseException:
            self.close()
            raise

    def _prepare(
        self,
        name: str,
        source: str,
        language: str,
        mode: str,
        memory_mib: int,
        checker: socket.socket | None,
    ) -> None:
        launch = self._launch
        deadline = time.monotonic() + _START_S
        setup = {
            "see": launch.see,
            "user": launch.user,
            "keep": launch.keep,
            "tasks": launch.tasks,
            "scratch": launch.scratch,
            "language": language,
            "source": source.encode("utf-8", "replace"),
            "mode": mode,
            "memory": memory_mib << 20,
            "output": MAX_OUTPUT,
            "checker": checker.fileno() if checker else -1,
            "filter": seccomp.build(threads=True, programs=language == "cpp"),
            "compile": {
                "command": _COMPILER,
                "cpu": _COMPILE_CPU_S,
                "wall": _COMPILE_WALL_S,
                "memory": _COMPILE_MEMORY,
                "file": _COMPILE_FILE,
            },
        }
        try:
            self._send(setup, deadline)
            self._receive(deadline)
        except (EOFError, OSError) as error:
            self._process.kill()
            said = self._process.stderr.read() if self._process.stderr else b""
            why = said.decode("utf-8", "replace").strip()[-500:] or repr(error)
            raise SandboxError(f"sandbox {name}: the box did not start: {why}") from None
        try:
            prepared = self._receive(time.monotonic() + _COMPILE_WALL_S + _SLACK_S)
        except TimeoutError:
            raise CompileError("timed out") from None
        except (EOFError, OSError):
            raise CompileError("the compiler crashed") from None
        if prepared.status != runner.FINISHED:
            raise CompileError(prepared.messages)

    def run(self, stdin: bytes, cpu_s: float, wall_s: float) -> Run:
        """Run once on an input. Never raises because of the submission."""
        self.start(stdin, cpu_s, wall_s)
        return self.result(wall_s)

    def start(self, stdin: bytes, cpu_s: float, wall_s: float) -> None:
        """Begin a run; `result` waits for it."""
        with contextlib.suppress(OSError):  # a dead box shows in `result`
            order = {"input": stdin, "cpu": cpu_s, "wall": wall_s}
            self._send(order, time.monotonic() + wall_s + _SLACK_S)

    def result(self, wall_s: float) -> Run:
        """Wait for the run that `start` began; a box that hangs or dies is a failed run."""
        try:
            return self._receive(time.monotonic() + wall_s + _SLACK_S)
        except TimeoutError:
            return Run(runner.TIMED_OUT, -signal.SIGKILL, wall_s, wall_s, b"", "the box hung")
        except (EOFError, OSError):
            return Run(runner.FAILED, -signal.SIGKILL, 0.0, 0.0, b"", "the box died")

    @property
    def control(self) -> socket.socket:
        """Readable when the run has ended."""
        return self._control

    def close(self) -> None:
        """End every process of the box."""
        self._control.close()
        self._process.kill()
        self._process.wait()
        if self._process.stderr:
            self._process.stderr.close()
        self._launch.cleanup()

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, message: dict[str, Any], deadline: float) -> None:
        body = marshal.dumps(message)
        self._control.settimeout(max(0.001, deadline - time.monotonic()))
        self._control.sendall(len(body).to_bytes(4, "little") + body)

    def _receive(self, deadline: float) -> Run:
        header = receive_bytes(self._control, runner.HEADER.size, deadline)
        status, code, cpu, wall, output_size, message_size = runner.HEADER.unpack(header)
        if output_size > MAX_OUTPUT or message_size > 1 << 20:
            raise EOFError
        output = receive_bytes(self._control, output_size, deadline)
        messages = receive_bytes(self._control, message_size, deadline).decode("utf-8", "replace")
        return Run(status, code, cpu, wall, output, messages)
