"""One vLLM engine with continuous batching, in this process, on a thread of its own.

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
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from prorl_nemo.errors import UserError
from prorl_nemo.rollout.complete_weights import EngineError, checkpoint_shapes, complete_weights
from prorl_nemo.rollout.engine_settings import EngineSettings, engine_arguments
from prorl_nemo.rollout.protocol import GenerationRequest, GenerationResult
from prorl_nemo.rollout.seeds import continuation_seed
from prorl_nemo.rollout.weights import Bucket, weight_checksums

T = TypeVar("T")
_Buckets = queue.Queue[tuple[Bucket, ...] | None]

BUCKET_TIMEOUT_SECONDS = 300.0
"""Silence of the sender after which a weight update has failed."""


class EngineBusyError(RuntimeError):
    """Weights cannot change under running requests: abort them or wait."""


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
        self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._finished: list[GenerationResult] = []
        self._news = threading.Condition()
        self._failure: BaseException | None = None
        self._internal_ids: dict[str, str] = {}
        self._prefixes: dict[str, list[int]] = {}
        self._weight_version = 0
        self._steps = 0
        self._asleep = False
        self._buckets: _Buckets | None = None
        self._update: Future[None] | None = None
        self._shapes = checkpoint_shapes(Path(settings.model))
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
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

    def abort(self, request_ids: Sequence[str]) -> int:
        """Drop requests; unknown and finished ones are ignored.

        Returns:
            the response tokens generated for them and now thrown away.
        """
        return sum(len(result.token_ids) for result in self.interrupt(request_ids))

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
        return EngineState(
            socket.gethostname(),
            os.getpid(),
            self._weight_version,
            self._steps,
            len(self._internal_ids),
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
        self._call(lambda: self._reload(version, named_tensors))

    def begin_update(self, version: int) -> None:
        """Open a weight update that arrives in buckets (`load_bucket`, `finish_update`)."""
        if self._update is not None:
            raise EngineError("a weight update is already open")
        self._buckets = queue.Queue(maxsize=4)
        arriving = self._arriving(self._buckets)
        self._update = self._post(lambda: self._reload(version, arriving))

    def load_bucket(self, *parts: Bucket) -> None:
        """Hand over the next bucket, or its part from every trainer rank that has pieces of it.

        Returns once the engine has room for another.
        """
        self._offer(parts)

    def finish_update(self) -> None:
        """Close the update. Raises as `update_weights` does."""
        self._offer(None)
        update, self._update, self._buckets = self._update, None, None
        assert update is not None
        update.result()

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
        return self._call(self._checksums)

    def sleep(self) -> None:
        """Give the GPU's memory to a colocated trainer; the next weight update takes it back.

        Weights are dropped, not kept on the host: an update follows before the next request.
        Without `EngineSettings.sleep`, and so on every CPU, nothing happens.
        """
        if self.settings.sleep:
            self._call(self._sleep)

    def shutdown(self) -> None:
        """Stop the thread and free the engine."""
        self._inbox.put(None)
        self._thread.join(timeout=60)

    # On the engine's thread

    def _run(self, ready: Future[None]) -> None:
        try:
            self._llm = self._start()
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        while True:
            waiting = self._failure is not None or not self._llm.has_unfinished_requests()
            try:
                item = self._inbox.get(block=waiting)
            except queue.Empty:
                try:
                    self._step()
                except BaseException as error:
                    self._fail(error)
                continue
            if item is None:
                self._llm.engine_core.shutdown()
                return
            work, future = item
            try:
                if self._failure is not None:
                    raise EngineError(f"the engine failed: {self._failure!r}")
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

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
        try:
            return LLMEngine.from_engine_args(EngineArgs(**engine_arguments(self.settings)))
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"vLLM cannot run {self.settings.model}: {error}") from error

    def _step(self) -> None:
        outputs = self._llm.step()
        self._steps += 1
        if not outputs:
            return
        results = []
        for output in outputs:
            if self._internal_ids.pop(output.request_id, None) is None:
                continue
            completion = output.outputs[0]
            text = completion.text
            prefix = self._prefixes.pop(output.request_id, None)
            if prefix is not None:
                # Decoded as a whole: a character may lie across the seam.
                whole = [*prefix, *completion.token_ids]
                text = self._llm.output_processor.tokenizer.decode(whole, skip_special_tokens=True)
            results.append(
                GenerationResult(
                    request_id=output.request_id,
                    token_ids=list(completion.token_ids),
                    logprobs=_sampled_logprobs(completion.logprobs),
                    finish_reason=str(completion.finish_reason),
                    text=text,
                    weight_version=self._weight_version,
                )
            )
        self._announce(results)

    def _add_all(self, requests: Sequence[GenerationRequest]) -> None:
        try:
            if self._asleep:
                raise EngineError("the engine sleeps: update its weights first")
            for request in requests:
                self._add(request)
        except BaseException as error:
            self._fail(error)

    def _add(self, request: GenerationRequest) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        try:
            length = len(request.prompt_token_ids) + request.max_tokens
            if length > self.settings.max_model_len:
                raise ValueError(
                    f"prompt of {len(request.prompt_token_ids)} tokens and response of "
                    f"{request.max_tokens} exceed the engine's {self.settings.max_model_len}"
                )
            done = len(request.prefix)
            parameters = SamplingParams(
                seed=continuation_seed(request.seed, done) if done else request.seed,
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=request.max_tokens - done,
                logprobs=0,
                flat_logprobs=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = tokens_input([*request.prompt_token_ids, *request.prefix])
            internal = self._llm.add_request(request.request_id, prompt, parameters)
        except (ValueError, VLLMClientError) as error:
            self._announce(
                [GenerationResult(request.request_id, [], [], "rejected", str(error), 0)]
            )
            return
        self._internal_ids[request.request_id] = internal
        if done:
            self._prefixes[request.request_id] = list(request.prefix)

    def _interrupt(self, request_ids: Sequence[str]) -> list[GenerationResult]:
        found = []
        running = []
        for request_id in request_ids:
            internal = self._internal_ids.pop(request_id, None)
            if internal is None:
                continue
            running.append(request_id)
            self._prefixes.pop(request_id, None)
            state = self._llm.output_processor.request_states.get(internal)
            if state is None:
                continue
            found.append(
                GenerationResult(
                    request_id=request_id,
                    token_ids=list(state.detokenizer.output_token_ids),
                    logprobs=_sampled_logprobs(state.logprobs_processor.logprobs),
                    finish_reason="interrupted",
                    text="",
                    weight_version=self._weight_version,
                )
            )
        self._llm.abort_request(running)
        dropped = set(request_ids)
        with self._news:
            found += [r for r in self._finished if r.request_id in dropped]
            self._finished = [r for r in self._finished if r.request_id not in dropped]
        return found

    def _score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        self._require_idle("score")
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for index, sequence in enumerate(sequences):
            self._llm.add_request(str(index), tokens_input(list(sequence)), parameters)
        scores: list[list[float]] = [[] for _ in sequences]
        while self._llm.has_unfinished_requests():
            for output in self._llm.step():
                # The first token has no prediction: its position holds no entry.
                scores[int(output.request_id)] = _sampled_logprobs(output.prompt_logprobs)
        return scores

    def _reload(self, version: int, named_tensors: Iterable[tuple[str, Any]]) -> None:
        self._require_idle("update weights")
        try:
            if self._asleep:
                self._llm.wake_up(["weights"])
            checked = complete_weights(named_tensors, self._shapes)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checked})
            if self._asleep:
                self._llm.wake_up(["kv_cache"])
                self._asleep = False
            if not self._llm.reset_prefix_cache():
                raise EngineError("the prefix cache still holds blocks of the old weights")
        except BaseException as error:
            self._fail(error)
            raise EngineError(f"weight update {version} failed half-way: {error}") from error
        self._weight_version = version

    def _sleep(self) -> None:
        self._require_idle("sleep")
        self._llm.sleep(level=2)
        self._asleep = True

    def _reset_prefix_cache(self) -> None:
        self._require_idle("reset the prefix cache")
        if not self._llm.reset_prefix_cache():
            raise EngineError("the prefix cache holds blocks of finished requests")

    def _checksums(self) -> dict[str, str]:
        from prorl_nemo.rollout.readback import named_weights

        dtype = getattr(torch, self.settings.dtype)

        def compute(model: torch.nn.Module) -> dict[str, str]:
            return weight_checksums(named_weights(model), dtype)

        with torch.inference_mode():
            checksums: dict[str, str] = self._llm.apply_model(compute)[0]
            return checksums

    def _arriving(self, buckets: _Buckets) -> Iterator[tuple[str, torch.Tensor]]:
        while True:
            try:
                parts = buckets.get(timeout=BUCKET_TIMEOUT_SECONDS)
            except queue.Empty:
                raise EngineError(f"no weights for {BUCKET_TIMEOUT_SECONDS:.0f} seconds") from None
            if parts is None:
                return
            yield from parts[0].tensors(*parts[1:])

    def _require_idle(self, what: str) -> None:
        if self._llm.has_unfinished_requests():
            raise EngineBusyError(f"cannot {what}: {len(self._internal_ids)} requests are running")

    # Between the threads

    def _post(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` on the engine's thread, after everything posted before."""
        future: Future[T] = Future()
        self._inbox.put((work, future))
        return future

    def _call(self, work: Callable[[], T]) -> T:
        return self._post(work).result()

    def _offer(self, parts: tuple[Bucket, ...] | None) -> None:
        if self._update is None or self._buckets is None:
            raise EngineError("no weight update is open: call begin_update first")
        deadline = time.monotonic() + BUCKET_TIMEOUT_SECONDS
        while not self._update.done():
            try:
                self._buckets.put(parts, timeout=0.2)
                return
            except queue.Full:
                if time.monotonic() > deadline:
                    raise EngineError("the engine takes no more weights") from None
        # Done before its last bucket: it failed, and this raises why.
        self._update.result()

    def _announce(self, results: list[GenerationResult]) -> None:
        with self._news:
            self._finished.extend(results)
            self._news.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._news:
            self._failure = error
            self._news.notify_all()


def _sampled_logprobs(logprobs: Any) -> list[float]:
    """The log-probability of the chosen token at every position that has one."""
    return [
        logprobs.logprobs[start]
        for start, end in zip(logprobs.start_indices, logprobs.end_indices, strict=True)
        if end > start
    ]
