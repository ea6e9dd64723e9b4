"""The process inside the box of one submission: prepares it once, then forks a run per test.

Loaded by a bare interpreter (`-I -S`) as a file of its own, standard library only. It gives
up everything it can first; each run gives up the rest before the first line of the
submission. Nothing secret ever gets in here: of a test it is told the input, never the
expected output. What it answers may be forged by the submission, which gains it nothing
that printing the same bytes would not.

Frames from the parent are marshalled; answers are a fixed header and raw bytes, so that the
parent never parses anything richer than numbers.
"""

from __future__ import annotations

import gc
import marshal
import os
import resource
import select
import struct
import sys
import time

# typing, signal and contextlib would double the time that this file takes to start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType
    from typing import Any

# status, exit code, CPU seconds, wall seconds, bytes of output, bytes of messages
HEADER = struct.Struct("=BiddII")
FINISHED, FAILED, TIMED_OUT, TOO_MUCH_OUTPUT, NOT_PREPARED = range(5)

_SIGKILL, _SIGXCPU = 9, 24  # on x86_64 and aarch64
_MESSAGES = 2000  # bytes kept of what a run writes to its standard error
# Descriptors of a run beside the standard ones: where a function call leaves its result or
# the checker talks to the parent, and the compiled program.
_RESULT, _PROGRAM = 9, 10
_STACK = 64 << 20
# Imported before the runs are forked when the submission names them: once, not once a test.
_COMMON = {"bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools"}
_COMMON |= {"heapq", "io", "itertools", "math", "operator", "queue", "random", "re", "string"}
# What graders of function-style tasks traditionally provide.
_PREAMBLE = "from typing import *\nimport collections, functools, heapq, itertools, math, re\n"


def main(tools: Any, control: int) -> None:
    """Serve one submission. `tools` is the module `inside`, `control` the parent's socket."""
    _Runner(tools, control).serve()


class _Runner:
    def __init__(self, tools: Any, control: int) -> None:
        self._tools = tools
        self._control = control
        self._setup: dict[str, Any] = {}
        self._code: CodeType | None = None
        self._program = -1
        self._scope: dict[str, Any] = {"__name__": "__main__"}

    def serve(self) -> None:
        self._null = os.open(os.devnull, os.O_RDWR)
        for reserved in (_RESULT, _PROGRAM):
            os.dup2(self._null, reserved)
        self._setup = self._receive()
        self._give_up()
        self._answer(FINISHED, 0, 0.0, 0.0, b"", b"")
        try:
            self._prepare()
        except _RefusedError as error:
            self._answer(NOT_PREPARED, 0, 0.0, 0.0, b"", str(error).encode("utf-8", "replace"))
            return
        self._answer(FINISHED, 0, 0.0, 0.0, b"", b"")
        gc.freeze()
        while True:
            order = self._receive()
            self._answer(*self._run(order))

    def _give_up(self) -> None:
        """Files by Landlock where there is no mount namespace; then root."""
        setup, tools = self._setup, self._tools
        if setup["see"] is not None:
            tools.see_only(*setup["see"])
        if setup["user"]:
            tools.become(setup["user"], setup["keep"])
        tools.die_with_parent()

    def _prepare(self) -> None:
        language, source = self._setup["language"], self._setup["source"]
        if language == "python":
            try:
                self._code = compile(source, "solution.py", "exec", dont_inherit=True)
            except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
                raise _RefusedError(f"{type(error).__name__}: {error}") from None
            for name in _COMMON.intersection(self._code.co_names):
                __import__(name)
            if self._setup["mode"] != "program":
                import json  # noqa: F401  (loaded once, used by every run)
            if self._setup["mode"] == "call":
                exec(_PREAMBLE, self._scope)
        else:
            self._compile(source)

    def _compile(self, source: bytes) -> None:
        folder = self._setup["scratch"]
        path, output = os.path.join(folder, "solution.cpp"), os.path.join(folder, "solution")
        with open(path, "wb") as file:
            file.write(source)
        limits = self._setup["compile"]
        environment = {"PATH": "/usr/bin:/bin", "TMPDIR": folder, "LC_ALL": "C"}
        command = [*limits["command"], path, "-o", output]
        status, code, _, _, _, messages = self._supervise(
            lambda: os.execve(command[0], command, environment),
            b"", limits["cpu"], limits["wall"], limits["memory"], limits["file"], None,
        )  # fmt: skip
        if status != FINISHED or code != 0:
            why = messages.decode("utf-8", "replace").strip()
            raise _RefusedError("timed out" if status == TIMED_OUT else why or f"exit {code}")
        self._program = os.memfd_create("solution", os.MFD_CLOEXEC)
        with open(output, "rb") as file:
            _write_all(self._program, file.read())
        os.unlink(output)

    def _run(self, order: dict[str, Any]) -> tuple[int, int, float, float, bytes, bytes]:
        setup = self._setup

        def body() -> None:
            self._tools.install_filter(setup["filter"])
            if self._code is None:
                os.execve(_PROGRAM, ["solution"], {"LC_ALL": "C.UTF-8"})
            os._exit(_execute(self._code, setup["mode"], self._scope))

        return self._supervise(
            body, order["input"], order["cpu"], order["wall"], setup["memory"], 0, setup["tasks"]
        )

    def _supervise(
        self, body: Any, stdin: bytes, cpu: float, wall: float, memory: int, file: int,
        tasks: int | None,
    ) -> tuple[int, int, float, float, bytes, bytes]:  # fmt: skip
        """Fork `body` under limits, collect what it writes, and end it when one is reached."""
        source = os.memfd_create("input", os.MFD_CLOEXEC)
        _write_all(source, stdin)
        os.lseek(source, 0, os.SEEK_SET)
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            try:
                self._enter(source, out_write, err_write, cpu, memory, file, tasks)
                body()
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}".encode("utf-8", "replace"))
            finally:
                os._exit(120)
        for descriptor in (source, out_write, err_write):
            os.close(descriptor)
        cap = self._setup["output"]
        try:
            status, output, messages = _collect(pid, out_read, err_read, start + wall, cap)
        finally:
            os.close(out_read)
            os.close(err_read)
            # The whole session: a compiler's children. A run cannot have any.
            for kill in (os.killpg, os.kill):
                try:
                    kill(pid, _SIGKILL)
                except OSError:
                    continue
            _, ended, usage = os.wait4(pid, 0)
        used = usage.ru_utime + usage.ru_stime
        code = os.waitstatus_to_exitcode(ended)
        if status == FINISHED and (code == -_SIGXCPU or used > cpu):
            status = TIMED_OUT
        if status == FINISHED and code != 0:
            status = FAILED
        return status, code, used, time.monotonic() - start, output, messages

    def _enter(
        self, source: int, out: int, err: int, cpu: float, memory: int, file: int,
        tasks: int | None,
    ) -> None:  # fmt: skip
        """In the forked run: its own descriptors, session and limits."""
        os.setsid()
        mode = self._setup["mode"]
        os.dup2(source, 0)
        os.dup2(self._null if mode == "call" else out, 1)
        os.dup2(err, 2)
        if mode == "call":
            os.dup2(out, _RESULT)
        elif mode == "check":
            os.dup2(self._setup["checker"], _RESULT)
        if self._program >= 0:
            os.dup2(self._program, _PROGRAM, inheritable=False)
        used = {_RESULT} if mode != "program" else {_PROGRAM} if self._program >= 0 else set()
        first = 3
        for descriptor in (*sorted(used), 256):
            os.closerange(first, descriptor)
            first = descriptor + 1
        limits = {
            resource.RLIMIT_CPU: int(cpu) + 1,
            resource.RLIMIT_AS: memory,
            resource.RLIMIT_FSIZE: file,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NOFILE: 64,
        }
        if tasks is not None:
            limits[resource.RLIMIT_NPROC] = tasks
        for kind, value in limits.items():
            resource.setrlimit(kind, (value, value))
        _, hard = resource.getrlimit(resource.RLIMIT_STACK)
        stack = _STACK if hard == resource.RLIM_INFINITY else min(_STACK, hard)
        resource.setrlimit(resource.RLIMIT_STACK, (stack, stack))

    def _receive(self) -> dict[str, Any]:
        size = int.from_bytes(self._read(4), "little")
        order: dict[str, Any] = marshal.loads(self._read(size))
        return order

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            chunk = os.read(self._control, min(size - len(parts), 1 << 20))
            if not chunk:
                os._exit(0)
            parts += chunk
        return bytes(parts)

    def _answer(
        self, status: int, code: int, cpu: float, wall: float, output: bytes, messages: bytes
    ) -> None:
        messages = messages[-_MESSAGES:]
        header = HEADER.pack(status, code, cpu, wall, len(output), len(messages))
        _write_all(self._control, header + output + messages)


class _RefusedError(Exception):
    """The submission does not compile."""


def _collect(pid: int, out: int, err: int, deadline: float, cap: int) -> tuple[int, bytes, bytes]:
    """Read both pipes until the process ends, the deadline passes or the cap is reached."""
    ended = os.pidfd_open(pid)
    output, messages = bytearray(), bytearray()
    poll = select.poll()
    for descriptor in (out, err, ended):
        poll.register(descriptor, select.POLLIN)
    try:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return TIMED_OUT, bytes(output), bytes(messages)
            ready = {descriptor for descriptor, _ in poll.poll(left * 1000)}
            if out in ready and not _drain(out, output):
                poll.unregister(out)
            if err in ready:
                if not _drain(err, messages):
                    poll.unregister(err)
                del messages[:-_MESSAGES]
            if len(output) > cap:
                return TOO_MUCH_OUTPUT, b"", bytes(messages)
            if ended in ready and not ready & {out, err}:
                # Nobody else holds the pipes open: a run cannot fork.
                return FINISHED, bytes(output), bytes(messages)
    finally:
        os.close(ended)


def _drain(descriptor: int, into: bytearray) -> bool:
    chunk = os.read(descriptor, 1 << 16)
    into += chunk
    return bool(chunk)


def _execute(code: CodeType, mode: str, scope: dict[str, Any]) -> int:
    """Run a Python submission as its interpreter would; returns the exit code."""
    try:
        if mode == "program":
            sys.argv = ["solution.py"]
            exec(code, scope)
        elif mode == "call":
            _call(code, scope)
        else:
            _check(code)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        _report(error)
        status = 1
    try:
        threading = sys.modules.get("threading")
        if threading is not None:
            threading._shutdown()  # type: ignore[attr-defined]
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        status = status or 1
    return status & 0xFF


def _report(error: BaseException) -> None:
    line = 0
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "solution.py":
            line = frame.tb_lineno
        frame = frame.tb_next
    try:
        text = f"{type(error).__name__} at line {line}: {error}"
    except BaseException:
        text = f"{type(error).__name__} at line {line}"
    os.write(2, text[:_MESSAGES].encode("utf-8", "replace"))


def _call(code: CodeType, scope: dict[str, Any]) -> None:
    """Call one function of the submission with the arguments on standard input."""
    import json

    request = json.loads(os.read(0, os.fstat(0).st_size))
    arguments = decode(request["args"])
    keywords = {name: decode(value) for name, value in request["kwargs"].items()}
    scope["__name__"] = "solution"
    exec(code, scope)
    name = request["name"]
    if "Solution" in scope and hasattr(scope["Solution"], name):
        function = getattr(scope["Solution"](), name)
    else:
        function = scope[name]
    _write_all(_RESULT, json.dumps(encode(function(*arguments, **keywords))).encode())


def _check(code: CodeType) -> None:
    """Run the test code of a data set; the function under test answers from another box."""
    import builtins
    import json

    def ask(*args: Any, **kwargs: Any) -> Any:
        request = {"args": encode(args), "kwargs": {k: encode(v) for k, v in kwargs.items()}}
        data = json.dumps(request).encode()
        _write_all(_RESULT, len(data).to_bytes(4, "little") + data)
        size = int.from_bytes(_read_all(4), "little")
        answer = json.loads(_read_all(size))
        if "error" in answer:
            kind = getattr(builtins, answer["error"], RuntimeError)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                kind = RuntimeError
            raise kind(answer["text"])
        return decode(answer["value"])

    name = os.read(0, 200).decode()
    exec(code, {"__name__": "check", name: ask, "__function_under_test__": (name, ask)})


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_all(size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        chunk = os.read(_RESULT, size - len(parts))
        if not chunk:
            raise EOFError("the grader has gone")
        parts += chunk
    return bytes(parts)


def encode(value: Any, depth: int = 0) -> Any:
    """A plain value as JSON: lists as they are, everything else JSON lacks under a tag.

    Raises:
        TypeError: an object that is not plain data.
    """
    if depth > 200:
        raise TypeError("the value is nested too deeply")
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    # Subclasses are reduced to their value by the base class's own methods.
    if isinstance(value, int):
        return int.__add__(value, 0)
    if isinstance(value, float):
        return float.__add__(value, 0.0)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, depth + 1) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"tuple": [encode(item, depth + 1) for item in tuple.__iter__(value)]}
    if isinstance(value, set):
        return {"set": [encode(item, depth + 1) for item in set.__iter__(value)]}
    if isinstance(value, frozenset):
        return {"frozenset": [encode(item, depth + 1) for item in frozenset.__iter__(value)]}
    if isinstance(value, dict):
        pairs = dict.items(value)
        return {"dict": [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in pairs]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind in (bytes, bytearray):
        return {"bytes": value.hex()}
    if hasattr(kind, "__next__"):  # an iterator: the values it gives, as long as memory lasts
        return [encode(item, depth + 1) for item in value]
    raise TypeError(f"returned {kind.__name__}, which is not plain data")


def decode(value: Any) -> Any:
    """The inverse of `encode`. Raises ValueError on anything that `encode` cannot have made."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError("not an encoded value")
    ((tag, content),) = value.items()
    if tag == "dict":
        return {decode(key): decode(item) for key, item in content}
    if tag == "complex":
        return complex(*content)
    if tag == "bytes":
        return bytes.fromhex(content)
    if tag in ("tuple", "set", "frozenset"):
        items = [decode(item) for item in content]
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[tag](items)
    raise ValueError("not an encoded value")
