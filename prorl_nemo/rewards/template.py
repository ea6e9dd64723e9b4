"""The trainer's side of the template process: fork a grading worker, look at it, end it.

The template (`worker`) imports the graders once; a worker is a fork of it, there in milliseconds.
It is started with an environment of its own and told what to do over a socket.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from prorl_nemo.errors import UserError
from prorl_nemo.rewards.frames import receive_frame, send_frame
from prorl_nemo.rewards.sandbox import SANDBOX_VARIABLE

_START_S = 120.0
_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from prorl_nemo.rewards.worker import template_main; template_main(int(sys.argv[2]))"
)


class PoolError(UserError):
    """Workers cannot be started or cannot grade at all; the response is not at fault."""


class _TemplateEndedError(PoolError):
    """The template process is gone; the next use starts it again."""


class Worker:
    """One forked grader: its socket and its end."""

    def __init__(self, template: Template, sock: socket.socket, pid: int, generation: int) -> None:
        self.socket = sock
        self._generation = generation
        self._template = template
        self._pid = pid

    def fit(self, generation: int) -> bool:
        """Whether it was forked with all that is loaded now, and still waits for work."""
        if self._generation != generation:
            return False
        self.socket.settimeout(0)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # it has ended, or says something that nobody asked

    def stop(self) -> str:
        """Kill and reap the process; says how it had ended."""
        self.socket.close()
        return self._template.kill(self._pid)


class Template:
    """The process that imports the graders and forks workers (`worker.template_main`).

    Started again, with its imports, when something outside ended it.
    """

    def __init__(self, memory_bytes: int, recycle_after: int, sandbox: str) -> None:
        self.generation = 0
        self._sandbox = sandbox
        self._limits = {"memory_bytes": memory_bytes, "recycle_after": recycle_after}
        self._loaded: list[str] = []
        self._lock = threading.Lock()
        self._start()

    def load(self, kind: str) -> None:
        """Import a grader in the template, once; workers forked later have it."""
        with self._lock:
            if kind not in self._loaded:
                self._ensure_running()
                self._load(kind)
                self._loaded.append(kind)

    def fork(self, confined: bool) -> Worker:
        """A fresh worker, confined and ready.

        Raises:
            PoolError: it died at its start, or the kernel does not let it be confined.
        """
        try:
            worker = self._fork(confined)
        except _TemplateEndedError:
            worker = self._fork(confined)
        try:
            greeting = receive_frame(worker.socket, time.monotonic() + _START_S)
        except (OSError, EOFError):
            raise PoolError(f"a grading worker died at its start: {worker.stop()}") from None
        if "unfit" in greeting:
            worker.stop()
            raise PoolError(f"a grading worker cannot be confined: {greeting['unfit']}")
        return worker

    def _fork(self, confined: bool) -> Worker:
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            self._ensure_running()
            self._send({"do": "fork", "confined": confined, **self._limits})
            try:
                socket.send_fds(self._control, [b"\0"], [theirs.fileno()])
            except OSError as error:
                raise self._ended(error) from None
            return Worker(self, ours, self._answer()["pid"], self.generation)

    def kill(self, pid: int) -> str:
        """End a worker and say how it ended."""
        try:
            with self._lock:
                self._send({"do": "kill", "pid": pid})
                status = self._answer().get("status")
        except PoolError:
            status = None
        if status is None:
            return "its template process ended"
        return f"signal {-status}" if status < 0 else f"exit status {status}"

    def close(self) -> None:
        """End the template, and with it the workers that are left."""
        self._control.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        # The trainer's environment holds credentials and settings that are nobody's business.
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg", "LC_ALL": "C.UTF-8"}
        environment[SANDBOX_VARIABLE] = self._sandbox
        path = [entry or os.getcwd() for entry in sys.path]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(path), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
            )
        self._control = ours
        self.generation += 1

    def _ensure_running(self) -> None:
        if self._process.poll() is not None:
            self._control.close()
            self._start()
            for kind in self._loaded:
                self._load(kind)

    def _load(self, kind: str) -> None:
        self._send({"do": "load", "kind": kind})
        answer = self._answer()
        if "error" in answer:
            raise PoolError(f"the grader for {kind} cannot be loaded: {answer['error']}")
        self.generation += 1

    def _send(self, order: dict[str, Any]) -> None:
        try:
            send_frame(self._control, order, time.monotonic() + _START_S)
        except OSError as error:
            raise self._ended(error) from None

    def _answer(self) -> dict[str, Any]:
        try:
            return receive_frame(self._control, time.monotonic() + _START_S)
        except (OSError, EOFError, ValueError) as error:
            raise self._ended(error) from None

    def _ended(self, error: Exception) -> _TemplateEndedError:
        """What to raise when the process no longer answers; it is dead afterwards."""
        self._process.kill()
        self._process.wait()
        return _TemplateEndedError(f"the grading template process has ended ({error!r})")
