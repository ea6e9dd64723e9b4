"""Several engines as Ray actors that may die: to the sampler they look like one.

A request belongs to one engine until its response has reached this process; only then is it
forgotten. When an engine dies or hangs, a new one takes its place, is sent the current weights
and then the engine's unanswered requests with the seeds they had. So no sample is lost, none
comes twice, and each is the one the dead engine would have made.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from prorl_nemo.errors import FaultError
from prorl_nemo.rollout.complete_weights import EngineError
from prorl_nemo.rollout.engine import EngineBusyError, EngineState
from prorl_nemo.rollout.engine_settings import EngineSettings
from prorl_nemo.rollout.fleet_member import ENGINE, Member
from prorl_nemo.rollout.fleet_memory import KeptWeights, Restarts, references
from prorl_nemo.rollout.protocol import GenerationRequest, GenerationResult

POLL_SECONDS = 0.5
"""How long an engine holds a poll open: the pace of its heartbeat."""
_LOST: Any = object()
"""In place of an answer: the engine died or failed, and was replaced."""


class FleetError(FaultError):
    """Engines die faster than `max_restarts` allows, or compute with wrong weights: save the run
    and stop."""


class Fleet:
    """The engines of a run; implements `protocol.GenerationEngine`.

    Args:
        settings: of every engine.
        count: engines.
        actor_options: Ray options per engine (`num_cpus`, `num_gpus`, placement), and under
            `environment` variables of its process; default: none reserved, since on one machine
            trainer and engines take turns.
        on_event: called with an event's name and details (`engine_restarted`).
        hang_seconds: an engine with work that makes no step for so long is replaced.
        start_seconds: an engine that has not started after so long is replaced.
        max_restarts: more restarts than this within `restart_window` seconds end the run.

    Raises:
        UserError: vLLM cannot run this model with these settings.
        FleetError: here and in every method: engines keep dying.
    """

    def __init__(
        self,
        settings: EngineSettings,
        count: int,
        *,
        actor_options: Sequence[dict[str, Any]] | None = None,
        on_event: Callable[[str, dict[str, Any]], None] = lambda event, details: None,
        hang_seconds: float = 900.0,
        start_seconds: float = 900.0,
        max_restarts: int = 5,
        restart_window: float = 3600.0,
    ) -> None:
        self.settings = settings
        self._options = list(actor_options or [{"num_cpus": 0}] * count)
        self._on_event = on_event
        self._hang_seconds = hang_seconds
        self._start_seconds = start_seconds
        self._restarts = Restarts(max_restarts, restart_window)
        self._weights: KeptWeights | None = None
        self._current = True
        self._early: list[GenerationResult] = []
        self._members = [Member(index, self._spawn(index)) for index in range(count)]
        self.states()

    # Generation

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests on the engines with the least to do; those of one prompt together.

        Raises:
            EngineError: the last weight update was broken off.
        """
        if not self._current:
            raise EngineError("the last weight update was broken off: update the weights first")
        shares: dict[int, list[GenerationRequest]] = {}
        for _, group in itertools.groupby(requests, key=lambda r: tuple(r.prompt_token_ids)):
            batch = list(group)
            member = min(self._members, key=lambda m: (m.load, m.index))
            if not member.requests:
                # A poll may be open since before a pause in which nobody wanted anything.
                member.silent, member.asked = 0.0, time.monotonic()
            member.requests |= {request.request_id: request for request in batch}
            shares.setdefault(member.index, []).extend(batch)
        # One call an engine: it computes nothing before all of them are there, so what it
        # computes together does not depend on when messages arrive.
        for index, share in shares.items():
            self._members[index].actor.call.remote("submit", share)

    def poll(self, max_wait: float) -> list[GenerationResult]:
        """Responses finished since the last call; waits up to `max_wait` seconds for one."""
        deadline = time.monotonic() + max_wait
        while True:
            for member in self._members:
                if member.requests and member.poll is None:
                    member.poll = member.actor.poll.remote(POLL_SECONDS)
                    member.asked = time.monotonic()
            waiting = [member.poll for member in self._members if member.poll is not None]
            remaining = max(0.0, deadline - time.monotonic())
            if not waiting and not self._early:
                time.sleep(remaining)
                return []
            patience = 0.0 if self._early else min(remaining, POLL_SECONDS)
            ready, _ = ray.wait(waiting, timeout=patience) if waiting else ([], [])
            if ready:
                ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
            results, self._early = self._early, []
            for member in self._members:
                if member.poll in ready:
                    results += self._receive(member)
                self._check_progress(member)
            if results or time.monotonic() >= deadline:
                return results

    def interrupt(self, request_ids: Sequence[str]) -> list[GenerationResult]:
        """Drop requests; returns what was generated for them, but for those of a dead engine.

        Does not wait for an engine that is starting in the place of another one.
        """
        wanted = set(request_ids)

        def interrupted(member: Member) -> Any:
            return member.actor.call.remote("interrupt", sorted(wanted & member.requests.keys()))

        concerned = [member for member in self._members if wanted & member.requests.keys()]
        started = [member for member in concerned if member.state is not None]
        answers = self._ask(started, interrupted)
        found, self._early = (
            [r for r in self._early if r.request_id in wanted],
            [r for r in self._early if r.request_id not in wanted],
        )
        for member, answer in zip(started, answers, strict=True):
            answer = [] if answer is _LOST else answer
            missing = wanted & member.requests.keys() - {r.request_id for r in answer}
            if missing and member.poll is not None:
                # They have finished, and are on their way here.
                arrived = self._receive(member)
                found += [r for r in arrived if r.request_id in wanted]
                self._early += [r for r in arrived if r.request_id not in wanted]
            found += answer
        for member in concerned:
            if member.state is None:
                interrupted(member)  # It was sent what the engine before it had not answered.
            for request_id in wanted & member.requests.keys():
                del member.requests[request_id]
        return found

    def reset_prefix_cache(self) -> None:
        """`VllmEngine.reset_prefix_cache` on every engine."""
        self._require_idle("reset the prefix cache")
        self._ask(self._members, lambda m: m.actor.call.remote("reset_prefix_cache"))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """`VllmEngine.score`, the sequences dealt out to the engines."""
        self._require_idle("score")
        count = len(self._members)
        shares = self._ask_all(lambda m: m.actor.call.remote("score", sequences[m.index :: count]))
        return [shares[i % count][i // count] for i in range(len(sequences))]

    def states(self) -> list[EngineState]:
        """Process, weight version and activity of every engine."""
        states: list[EngineState] = self._ask_all(lambda m: m.actor.state.remote())
        for member, state in zip(self._members, states, strict=True):
            member.note(state)
        return states

    # Weights

    @property
    def weight_version(self) -> int:
        return self._weights.version if self._weights else 0

    def update_weights(
        self,
        version: int,
        buckets: Iterable[Any],
        again: Callable[[], Iterable[Any]] | None = None,
    ) -> None:
        """Replace the weights of every engine in place.

        Args:
            version: what samples made from now on are marked with.
            buckets: `WeightBucket`s, or tuples of Ray references to them, one from each rank that
                has pieces (so that weights do not pass through this process). The references are
                kept until the next update: a restarted engine is sent them again.
            again: for buckets that can be had only once, and by all engines: gives the same
                weights as `buckets` that can be kept.

        Raises:
            EngineBusyError: requests are unanswered; nothing was changed.
            FleetError: engines refuse the tensors again and again.
        """
        self._require_idle("update weights")
        # The old buckets go first: the object store need not hold two sets of weights.
        self._weights, self._current = None, False
        if again is not None:
            self.states()  # One that is missing would let the others wait.
        for member in self._members:
            member.actor.call.remote("begin_update", version)
        kept: list[tuple[Any, ...]] = []
        for bucket in buckets:
            parts = references(bucket)
            kept.append(parts)
            for member in self._members:
                member.actor.call.remote("load_bucket", *parts)
        self._weights = KeptWeights(version, None if again else kept, again)
        self._current = True
        self._ask(self._members, lambda m: m.actor.call.remote("finish_update"))

    def weights_checksum(self) -> list[dict[str, str]]:
        """`VllmEngine.weights_checksum` of every engine."""
        return self._ask_all(lambda m: m.actor.call.remote("weights_checksum"))

    def verify_weights(self, expected: dict[str, str]) -> None:
        """Compare every engine's weights with `weights.weight_checksums` of what was sent.

        Raises:
            FleetError: naming engine and tensors.
        """
        for index, found in enumerate(self.weights_checksum()):
            wrong = [name for name, checksum in expected.items() if found.get(name) != checksum]
            if wrong:
                raise FleetError(
                    f"engine {index} computes with other weights than the trainer: "
                    f"{len(wrong)} of {len(expected)} tensors differ ({', '.join(wrong[:5])})"
                )

    def sleep(self) -> None:
        """`VllmEngine.sleep` on every engine: the next `update_weights` wakes them."""
        self._ask_all(lambda m: m.actor.call.remote("sleep"))

    def shutdown(self) -> None:
        """End the engines' processes."""
        for member in self._members:
            member.end()
        self._members = []

    # Faults

    def _spawn(self, index: int) -> Any:
        options = dict(self._options[index])
        variables = self.settings.environment() | options.pop("environment", {})
        options |= {"runtime_env": {"env_vars": variables}, "max_restarts": 0}
        actor = ENGINE.options(**options).remote(self.settings)
        actor.start.remote()
        return actor

    def _ask_all(self, call: Callable[[Member], Any]) -> list[Any]:
        """One answer per engine; an engine that dies over it is asked again once replaced."""
        answers = self._ask(self._members, call)
        for member in self._members:
            while answers[member.index] is _LOST:
                (answers[member.index],) = self._ask([member], call)
        return answers

    def _ask(self, members: Sequence[Member], call: Callable[[Member], Any]) -> list[Any]:
        """One answer per member; _LOST from an engine that died or failed, and was replaced."""
        asked = [call(member) for member in members]
        return [self._answer(m, reference) for m, reference in zip(members, asked, strict=True)]

    def _answer(self, member: Member, reference: Any) -> Any:
        limit = self._patience(member)
        try:
            return ray.get(reference, timeout=limit)
        except RayTaskError as error:
            if not isinstance(error.cause, EngineError):
                raise error.cause from None
            reason = f"failed: {error.cause}"
        except GetTimeoutError:
            reason = f"gave no answer for {limit:.0f} seconds"
        except RayError:
            reason = "died"  # Or its node, and what it had made.
        self._replace(member, reason)
        return _LOST

    def _receive(self, member: Member) -> list[GenerationResult]:
        reference, member.poll = member.poll, None
        answer = self._answer(member, reference)
        if answer is _LOST:
            return []
        results, state = answer
        # Only time spent asking counts as silence, not that in which nobody asked.
        stuck = state == member.state and not results
        member.silent = member.silent + time.monotonic() - member.asked if stuck else 0.0
        member.note(state)
        # A response is passed on once, and only while somebody wants it.
        return [r for r in results if member.requests.pop(r.request_id, None) is not None]

    def _patience(self, member: Member) -> float:
        """Seconds of silence after which an engine counts as hung; starting takes longer."""
        return self._hang_seconds if member.state is not None else self._start_seconds

    def _check_progress(self, member: Member) -> None:
        silent = member.silent
        if member.poll is not None:
            silent += time.monotonic() - member.asked
        if member.requests and silent > self._patience(member):
            self._replace(member, f"made no step for {silent:.0f} seconds")

    def _replace(self, member: Member, reason: str) -> None:
        failures, allowed = self._restarts.one_more(), self._restarts.most
        if failures > allowed:
            raise FleetError(
                f"rollout.max_engine_restarts: engine {member.index} {reason}; {failures} engine "
                f"failures within {self._restarts.window:.0f} seconds, {allowed} are allowed; look "
                "for memory (rollout.kv_cache_mib) and for faults of the machine, and start again"
            )
        member.end()
        member.actor = self._spawn(member.index)
        member.poll, member.state, member.process, member.silent = None, None, None, 0.0
        if self._weights is not None:
            self._weights.send(member.actor)
        if member.requests:
            member.actor.call.remote("submit", list(member.requests.values()))
        self._on_event(
            "engine_restarted",
            {"engine": member.index, "reason": reason, "resubmitted": len(member.requests)},
        )

    def _require_idle(self, what: str) -> None:
        waiting = sum(len(member.requests) for member in self._members)
        if waiting:
            raise EngineBusyError(f"cannot {what}: {waiting} requests are unanswered")
