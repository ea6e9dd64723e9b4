"""One engine of a fleet: the Ray actor it lives in, and what the fleet knows of it."""

from __future__ import annotations

import socket
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray

from prorl_nemo.rollout.complete_weights import EngineError
from prorl_nemo.rollout.engine import EngineState, VllmEngine
from prorl_nemo.rollout.engine_settings import EngineSettings
from prorl_nemo.rollout.protocol import GenerationRequest, GenerationResult

LEAVE_SECONDS = 5.0
"""How long an actor's process has to leave before it is killed."""


class _EngineActor:
    """A `VllmEngine` in a process of its own.

    All calls but `poll` share one thread, so they are carried out in the order they were made:
    start, weights, requests.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._engine: Future[VllmEngine] = Future()

    def start(self) -> EngineState:
        try:
            self._engine.set_result(VllmEngine(self._settings))
        except BaseException as error:
            self._engine.set_exception(error)
        return self.state()

    def state(self) -> EngineState:
        """Raises what the engine's start raised."""
        return self._engine.result().state

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._started(), method)(*arguments)

    @ray.method(concurrency_group="poll")
    def poll(self, max_wait: float) -> tuple[list[GenerationResult], EngineState | None]:
        try:
            engine = self._started(max_wait)
        except TimeoutError:
            return [], None
        return engine.poll(max_wait), engine.state

    def _started(self, max_wait: float | None = None) -> VllmEngine:
        """The engine. One that takes another's place and cannot start, where the first one could,
        has failed: its GPU's memory may not be free yet."""
        try:
            return self._engine.result(max_wait)
        except TimeoutError:
            raise
        except BaseException as error:
            raise EngineError(f"it could not start: {error!r}") from error


# Ray's type stubs know no concurrency groups.
ENGINE: Any = ray.remote(concurrency_groups={"poll": 1})(_EngineActor)  # type: ignore[call-overload]


@dataclass
class Member:
    """One place in the fleet, whichever actor fills it."""

    index: int
    actor: Any
    requests: dict[str, GenerationRequest] = field(default_factory=dict)
    poll: Any = None
    state: EngineState | None = None
    process: psutil.Process | None = None
    asked: float = 0.0
    silent: float = 0.0

    def note(self, state: EngineState | None) -> None:
        """Take a report of the engine; keep its process, if it is one of this machine."""
        self.state = state
        local = state is not None and state.host == socket.gethostname()
        if state is not None and local and self.process is None:
            with suppress(psutil.NoSuchProcess):
                self.process = psutil.Process(state.pid)

    def end(self) -> None:
        """Kill the actor."""
        ray.kill(self.actor)
        if self.process is not None:
            # Ray asks the process to leave, which a stopped one does not hear. Killed before it
            # could, Ray would report a crash. psutil kills no other process of the same id.
            _, stopped = psutil.wait_procs([self.process], timeout=LEAVE_SECONDS)
            for process in stopped:
                process.kill()

    @property
    def load(self) -> int:
        """Tokens this engine may still have to produce or read."""
        return sum(len(r.prompt_token_ids) + r.max_tokens for r in self.requests.values())
