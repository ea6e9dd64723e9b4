"""One vLLM engine with continuous batching, in this process, on a thread of its own.

With `EngineSettings.tensor_parallel` the model itself is in worker processes, children of this
one, which schedules and asks them; the engine fails when one of them dies.

Every call into vLLM happens on that thread, because neither `LLMEngine` nor OpenMP's thread pool
is to be shared: requests and commands reach it through a queue, and between two commands it
steps the engine for as long as there is work. Use it directly in a process apart from the
trainer's, or through `fleet.Fleet`, which puts several of them into Ray actors.

What vLLM needs on CPU, and why, is in `engine_settings.engine_arguments`.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from prorl_nemo.errors import UserError
from prorl_nemo.rollout.complete_weights import EngineError, checkpoint_shapes
from prorl_nemo.rollout.engine_settings import EngineSettings, engine_arguments
from prorl_nemo.rollout.protocol import GenerationRequest, GenerationResult
from prorl_nemo.rollout.running import Running
from prorl_nemo.rollout.weight_stream import WeightStream
from prorl_nemo.rollout.weights import Bucket, pack_buckets
from prorl_nemo.rollout.workers import bind_to_engine, checksums, load_weights

T = TypeVar("T")


class EngineBusyError(RuntimeError):
    """Weights cannot change under running requests: interrupt them or wait."""


@dataclass(frozen=True)
class EngineState:
    """What a fleet asks to know whether an engine lives and moves."""

    host: str
    pid: int
    weight_version: int
    steps: int
    unfinished: int


class VllmEngine:
    """Generate, score, and take new weights in place.

    Raises:
        UserError: vLLM cannot run this model with these settings.
    """

    def __init__(self, settings: EngineSettings) -> None:
        os.environ.update(settings.environment())
        self.settings = settings
        self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._finished: list[GenerationResult] = []
        self._news = threading.Condition()
        self._failure: BaseException | None = None
        self._asleep = False
        self._stream: WeightStream | None = None
        self._update: Future[None] | None = None
        self._shapes = checkpoint_shapes(Path(settings.model))
        ready: Future[None] = Future()
        threading.Thread(target=self._run, args=(ready,), daemon=True).start()
        ready.result()

    # Generation

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests. One that cannot be served comes back as `rejected`."""
        self._post(lambda: self._add_all(requests))

    def poll(self, max_wait: float) -> list[GenerationResult]:
        """Responses finished since the last call; waits up to `max_wait` seconds for one.

        Raises:
            EngineError: the engine failed.
        """
        with self._news:
            self._news.wait_for(lambda: self._finished or self._failure, max_wait)
            if self._failure is not None:
                raise EngineError(f"the engine failed: {self._failure!r}") from self._failure
            finished, self._finished = self._finished, []
        return finished

    def interrupt(self, request_ids: Sequence[str]) -> list[GenerationResult]:
        """Drop requests; unknown ones are ignored.

        Returns:
            what has been generated for them, whole responses if they finished meanwhile.
        """
        return self._call(lambda: self._interrupt(request_ids))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of given tokens at temperature 1, as the engine computes them.

        Args:
            sequences: token ids, each sequence at least two tokens.

        Returns:
            for each sequence of length L the L - 1 log-probabilities of its tokens but the first.
        """
        return self._call(lambda: self._score(sequences))

    @property
    def state(self) -> EngineState:
        running = self._running
        return EngineState(
            socket.gethostname(), os.getpid(), running.weight_version, running.steps, len(running)
        )

    # Weights

    def update_weights(self, version: int, named_tensors: Iterable[tuple[str, Any]]) -> None:
        """Replace all weights in place.

        Args:
            version: what samples made from now on are marked with.
            named_tensors: every tensor of the checkpoint under its Hugging Face name; a tied
                output head may be left out.

        Raises:
            EngineBusyError: requests are running; nothing was changed.
            EngineError: a tensor is missing, unknown or of a wrong shape, or vLLM failed. The
                weights are mixed then, and the engine refuses all work.
        """
        self._call(lambda: self._reload(version, ((b,) for b in pack_buckets(named_tensors))))

    def begin_update(self, version: int) -> None:
        """Open a weight update that arrives in buckets (`load_bucket`, `finish_update`)."""
        if self._update is not None:
            raise EngineError("a weight update is already open")
        stream = self._stream = WeightStream()
        self._update = self._post(lambda: self._reload(version, stream))

    def load_bucket(self, *parts: Bucket) -> None:
        """Hand over the next bucket, or its part from every trainer rank that has pieces of it.

        Returns once the engine has room for another.
        """
        self._offer(parts)

    def finish_update(self) -> None:
        """Close the update. Raises as `update_weights` does."""
        try:
            self._offer(None)
            assert self._update is not None
            self._update.result()
        finally:
            self._update = self._stream = None

    def reset_prefix_cache(self) -> None:
        """Forget the prompts computed so far.

        Raises:
            EngineBusyError: requests are running.
        """
        self._call(self._reset_prefix_cache)

    def weights_checksum(self) -> dict[str, str]:
        """Checksum of every tensor the engine computes with, by Hugging Face name.

        Compare with `weights.weight_checksums` of what was sent.
        """
        return self._call(lambda: checksums(self._llm, getattr(torch, self.settings.dtype)))

    def sleep(self) -> None:
        """Give the GPU's memory to a colocated trainer; the next weight update takes it back.

        Weights are dropped, not kept on the host: an update follows before the next request.
        Without `EngineSettings.sleep`, and so on every CPU, nothing happens.
        """
        if self.settings.sleep:
            self._call(self._sleep)

    # On the engine's thread

    def _run(self, ready: Future[None]) -> None:
        try:
            self._llm = self._start()
            self._running = Running(self._llm, self.settings)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        while True:
            waiting = self._failure is not None or not self._llm.has_unfinished_requests()
            try:
                work, future = self._inbox.get(block=waiting)
            except queue.Empty:
                try:
                    self._announce(self._running.step())
                except BaseException as error:
                    self._fail(error)
                continue
            try:
                if self._failure is not None:
                    raise EngineError(f"the engine failed: {self._failure!r}")
                future.set_result(work())
            except BaseException as error:
                future.set_exception(self._seen(error))

    def _start(self) -> Any:
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        if current_platform.is_cpu():
            # The sampler holds one small compiled function: on CPU it gains nothing, and the
            # first token would wait seconds for a C++ compiler.
            torch._dynamo.config.disable = True
            os.environ["TORCH_COMPILE_DISABLE"] = "1"  # The same for worker processes.
        try:
            llm = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(self.settings)))
        except (ValueError, NotImplementedError) as error:
            told = f"vLLM cannot run {self.settings.model}: {error}"
            if not current_platform.is_cpu() and "utilization" in told:
                told += " (its share is rollout.gpu_memory_share; prorl eval: --gpu-memory-share)"
            raise UserError(told) from error
        if self.settings.tensor_parallel > 1:
            bind_to_engine(llm, lambda: self._fail(EngineError("a worker process died")))
        return llm

    def _seen(self, error: BaseException) -> BaseException:
        """What a caller is told. Whatever comes out of worker processes ends the engine."""
        refusals = (EngineError, EngineBusyError, ValueError)
        if self.settings.tensor_parallel == 1 or isinstance(error, refusals):
            return error
        self._fail(error)
        failed = EngineError(f"the engine failed: {error!r}")
        failed.__cause__ = error
        return failed

    def _add_all(self, requests: Sequence[GenerationRequest]) -> None:
        try:
            if self._asleep:
                raise EngineError("the engine sleeps: update its weights first")
            refused = [self._running.add(request) for request in requests]
            self._announce([result for result in refused if result is not None])
        except BaseException as error:
            self._fail(error)

    def _interrupt(self, request_ids: Sequence[str]) -> list[GenerationResult]:
        found = self._running.interrupt(request_ids)
        dropped = set(request_ids)
        with self._news:
            found += [r for r in self._finished if r.request_id in dropped]
            self._finished = [r for r in self._finished if r.request_id not in dropped]
        return found

    def _score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self._require_idle("score")
        return self._running.score(sequences)

    def _reload(self, version: int, buckets: Iterable[tuple[Bucket, ...]]) -> None:
        self._require_idle("update weights")
        try:
            if self._asleep:
                self._llm.wake_up(["weights"])
            load_weights(self._llm, buckets, self._shapes)
            if self._asleep:
                self._llm.wake_up(["kv_cache"])
                self._asleep = False
            if not self._llm.reset_prefix_cache():
                raise EngineError("the prefix cache still holds blocks of the old weights")
        except BaseException as error:
            self._fail(error)
            raise EngineError(f"weight update {version} failed half-way: {error}") from error
        self._running.weight_version = version

    def _sleep(self) -> None:
        self._require_idle("sleep")
        self._llm.sleep(level=2)
        self._asleep = True

    def _reset_prefix_cache(self) -> None:
        self._require_idle("reset the prefix cache")
        if not self._llm.reset_prefix_cache():
            raise EngineError("the prefix cache holds blocks of finished requests")

    def _require_idle(self, what: str) -> None:
        if self._llm.has_unfinished_requests():
            raise EngineBusyError(f"cannot {what}: {len(self._running)} requests are running")

    # Between the threads

    def _post(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` on the engine's thread, after everything posted before."""
        future: Future[T] = Future()
        self._inbox.put((work, future))
        return future

    def _call(self, work: Callable[[], T]) -> T:
        return self._post(work).result()

    def _offer(self, parts: tuple[Bucket, ...] | None) -> None:
        if self._update is None or self._stream is None:
            raise EngineError("no weight update is open: call begin_update first")
        self._stream.put(parts, self._update)

    def _announce(self, results: list[GenerationResult]) -> None:
        if results:
            with self._news:
                self._finished.extend(results)
                self._news.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._news:
            self._failure = self._failure or error
            self._news.notify_all()
