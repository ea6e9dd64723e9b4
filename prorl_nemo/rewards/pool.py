"""Grading in killable worker processes: one bad response costs one sample a zero.

A library that hangs inside C code can be stopped only from outside, so every request runs
in a process of its own kind with three limits: a soft one inside (an exception), a hard one
outside (SIGKILL), and one of memory. Each of the `workers` threads here drives at most one
confined process and one that launches the code sandbox; it sends a request, waits, and on
a limit replaces the process. A request is sent to a grader once, so it is answered once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from prorl_nemo.errors import UserError
from prorl_nemo.rewards.frames import receive_frame, send_frame
from prorl_nemo.rewards.registry import kind_of
from prorl_nemo.rewards.template import PoolError, Template, Worker
from prorl_nemo.rewards.verdict import GradingError, Verdict, zero

# A verdict is small; a worker that was taken over must not fill our memory.
_MAX_ANSWER = 1 << 20


class GraderPool:
    """Worker processes that grade.

    Args:
        workers: requests graded at the same time.
        soft_limit_s: seconds after which a grading is interrupted and scores 0.
        hard_limit_s: seconds after which its process is killed and it scores 0.
        memory_mib: memory one worker may take beyond its imports.
        recycle_after: gradings after which a worker is replaced, against slow leaks.
        preload: kinds to import at the start; others are imported when first seen.
        sandbox: where code runs: auto, bubblewrap, landlock, or none (no isolation).

    Use as a context manager or call `close`. Any thread may submit.
    """

    def __init__(
        self,
        workers: int = 2,
        *,
        soft_limit_s: float = 2.0,
        hard_limit_s: float = 4.0,
        memory_mib: int = 2048,
        recycle_after: int = 5000,
        preload: Sequence[str] = (),
        sandbox: str = "auto",
    ) -> None:
        if workers < 1:
            raise UserError(f"workers: {workers} graders cannot grade; use 1 or more")
        if not 0 < soft_limit_s < hard_limit_s:
            raise UserError("hard_limit_s must exceed soft_limit_s, and both must exceed 0")
        self.soft_limit_s = soft_limit_s
        self.hard_limit_s = hard_limit_s
        self._template = Template(memory_mib << 20, recycle_after, sandbox)
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._pending: dict[str, Future[Verdict]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._killed = 0
        self._threads = [
            threading.Thread(target=self._drive, name=f"grader-{i}", daemon=True)
            for i in range(workers)
        ]
        try:
            for kind in preload:
                kind_of({"kind": kind})
                self._template.load(kind)
        except BaseException:
            self._template.close()
            raise
        for thread in self._threads:
            thread.start()

    @property
    def killed(self) -> int:
        """Processes that were killed or died while grading."""
        return self._killed

    def submit(
        self, request_id: str, grading: dict[str, Any], text: str, *, training: bool = True
    ) -> Future[Verdict]:
        """Grade one response, soon.

        Args:
            request_id: unique among the requests that are not yet answered.
            grading: the prompt's grading record.
            text: the response.
            training: see `registry.grade`.

        Returns:
            The verdict to come. It raises GradingError if the record is malformed and
            PoolError if no worker can grade; never because of the response.

        Raises:
            ValueError: the pool is closed, or the id is still pending.
        """
        request = _Request(request_id, grading, text, training, Future())
        with self._lock:
            if self._closed:
                raise ValueError("the grader pool is closed")
            if request_id in self._pending:
                raise ValueError(f"request {request_id} is already being graded")
            self._pending[request_id] = request.future
            self._requests.put(request)
        return request.future

    def grade_many(
        self, items: Iterable[tuple[dict[str, Any], str]], *, training: bool = True
    ) -> list[Verdict]:
        """Grade (record, response) pairs; verdicts in the same order."""
        prefix = f"many-{id(items)}-{time.monotonic_ns()}"
        futures = [
            self.submit(f"{prefix}-{i}", grading, text, training=training)
            for i, (grading, text) in enumerate(items)
        ]
        return [future.result() for future in futures]

    def close(self) -> None:
        """Finish what is being graded, cancel what waits, end every process."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting: list[_Request] = []
            while True:
                try:
                    request = self._requests.get_nowait()
                except queue.Empty:
                    break
                if request is not None:
                    waiting.append(request)
            for _ in self._threads:
                self._requests.put(None)
        for request in waiting:
            self._forget(request)
            request.future.cancel()
        for thread in self._threads:
            thread.join()
        self._template.close()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drive(self) -> None:
        """Body of a thread: grade requests one after the other."""
        processes: dict[bool, Worker] = {}
        while (request := self._requests.get()) is not None:
            if not request.future.set_running_or_notify_cancel():
                self._forget(request)
                continue
            try:
                verdict = self._grade(request, processes)
            except BaseException as error:
                self._forget(request)
                request.future.set_exception(error)
            else:
                self._forget(request)
                request.future.set_result(verdict)
        for worker in processes.values():
            worker.stop()

    def _forget(self, request: _Request) -> None:
        with self._lock:
            self._pending.pop(request.request_id, None)

    def _grade(self, request: _Request, processes: dict[bool, Worker]) -> Verdict:
        kind = kind_of(request.grading)
        self._template.load(str(request.grading["kind"]))
        extra = getattr(kind.load(), "extra_seconds", None)
        more = float(extra(request.grading)) if extra else 0.0
        worker = processes.pop(kind.confined, None)
        if worker is not None and not worker.fit(self._template.generation):
            worker.stop()
            worker = None
        if worker is None:
            worker = self._template.fork(kind.confined)
        message = {
            "id": request.request_id,
            "grading": request.grading,
            "text": request.text,
            "training": request.training,
            "seconds": self.soft_limit_s + more,
        }
        deadline = time.monotonic() + self.hard_limit_s + more
        try:
            send_frame(worker.socket, message, deadline)
            answer = receive_frame(worker.socket, deadline, _MAX_ANSWER)
            verdict = _read(answer, request.request_id)
        except TimeoutError:
            self._killed += 1
            worker.stop()
            return zero(f"timed out: killed after {self.hard_limit_s + more:g} s")
        except (EOFError, OSError):
            self._killed += 1
            return zero(f"worker died: {worker.stop()}")
        except (ValueError, TypeError, KeyError):
            self._killed += 1
            worker.stop()
            return zero("worker died: it sent no verdict")
        except BaseException:
            worker.stop()
            raise
        if answer.get("last"):
            worker.stop()
        else:
            processes[kind.confined] = worker
        return verdict


@dataclass(frozen=True)
class _Request:
    request_id: str
    grading: dict[str, Any]
    text: str
    training: bool
    future: Future[Verdict]


def _read(answer: dict[str, Any], request_id: str) -> Verdict:
    if "bad_record" in answer:
        raise GradingError(str(answer["bad_record"]))
    if "unfit" in answer:
        raise PoolError(f"a grading worker cannot work: {answer['unfit']}")
    if answer["id"] != request_id:
        raise ValueError("the answer is to another request")
    score, parts = answer["score"], answer.get("parts", {})
    if not (isinstance(score, int | float) and isinstance(parts, dict)):
        raise TypeError("score or parts")
    return Verdict(score, parts, str(answer["reason"]))
