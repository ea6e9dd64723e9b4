"""What the fleet decides when engines die, hang or start, without Ray. Calls are carried out at
once, and answers handed out when they are asked for. Real engines: tests/slow/test_engine.py."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from prorl_nemo.errors import UserError
from prorl_nemo.rollout import fleet as fleet_module
from prorl_nemo.rollout import fleet_member
from prorl_nemo.rollout.complete_weights import EngineError
from prorl_nemo.rollout.engine import EngineBusyError, EngineState, VllmEngine
from prorl_nemo.rollout.engine_settings import EngineSettings
from prorl_nemo.rollout.fleet import Fleet, FleetError
from prorl_nemo.rollout.fleet_member import _EngineActor
from prorl_nemo.rollout.protocol import GenerationRequest, GenerationResult

SETTINGS = EngineSettings("model", "float32", 256)


class Due:
    """A reference: what it stands for is done when somebody asks, once."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._done, self._value = work, False, None

    def value(self) -> Any:
        if not self._done:
            self._value, self._done = self._work(), True
        return self._value


class Engine:
    """An engine's actor, as the fleet sees it.

    Attributes:
        requests: that it works on.
        finished: responses that the next poll brings.
        fault: raised by every answer from now on; poll_fault: by those of polls.
        starting: whether it gives no other answers yet.
        asked: names of the calls it was sent.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.requests: dict[str, GenerationRequest] = {}
        self.finished: list[GenerationResult] = []
        self.fault: RayError | None = None
        self.poll_fault: RayError | None = None
        self.starting = False
        self.asked: list[str] = []
        for name in ("start", "call", "poll"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))
        self.state = SimpleNamespace(remote=lambda: self._answer(self._state))

    def _answer(self, work: Callable[[], Any]) -> Due:
        if self.fault is None:
            value = work()  # Calls are carried out in their order, whoever looks at them.

        def given() -> Any:
            if self.fault is not None:
                raise self.fault
            if self.starting:
                raise GetTimeoutError
            return value

        return Due(given)

    def _start(self) -> Due:
        return self._answer(lambda: None)

    def _state(self) -> EngineState:
        return EngineState("elsewhere", self.number, 0, 0, len(self.requests))

    def _call(self, method: str, *arguments: Any) -> Due:
        self.asked.append(method)
        works: dict[str, Callable[..., Any]]
        works = {"submit": self._submit, "interrupt": self._interrupt}
        return self._answer(lambda: works[method](*arguments) if method in works else None)

    def _submit(self, requests: list[GenerationRequest]) -> None:
        self.requests |= {request.request_id: request for request in requests}

    def _interrupt(self, ids: list[str]) -> list[GenerationResult]:
        return [response(i, "interrupted") for i in ids if self.requests.pop(i, None)]

    def _poll(self, max_wait: float) -> Due:
        def given() -> Any:
            if fault := self.poll_fault or self.fault:
                raise fault
            if self.starting:
                return [], None
            done, self.finished = self.finished, []
            return done, self._state()

        return Due(given)

    def finish(self, request_id: str) -> None:
        del self.requests[request_id]
        self.finished.append(response(request_id))


def response(request_id: str, reason: str = "stop") -> GenerationResult:
    return GenerationResult(request_id, [1, 2], [-0.5, -0.5], reason, "", 0)


def requests(*names: str) -> list[GenerationRequest]:
    return [GenerationRequest(name, [len(name), 7], 1, 1.0, 8) for name in names]


class FakeRay:
    """What the fleet asks of Ray.

    Attributes:
        engines: all that were ever started.
        arrive: whether polls are answered; else they stay open.
    """

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.now = 0.0
        self.arrive = True
        self.next_starting = False

    def options(self, **options: Any) -> Any:
        return SimpleNamespace(remote=self._new)

    def _new(self, settings: EngineSettings) -> Engine:
        engine = Engine(len(self.engines))
        engine.starting = self.next_starting
        self.engines.append(engine)
        return engine

    def get(self, reference: Due, timeout: float | None = None) -> Any:
        try:
            return reference.value()
        except GetTimeoutError:
            assert timeout is not None, "a wait without an end"
            self.now += timeout
            raise

    def wait(self, references: list[Due], num_returns: int = 1, timeout: float = 0) -> Any:
        self.now += min(timeout, 0.01)
        return (references, []) if self.arrive else ([], references)

    def kill(self, engine: Engine) -> None:
        engine.fault = RayActorError()

    put = staticmethod(lambda bucket: bucket)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    for module in (fleet_module, fleet_member):
        monkeypatch.setattr(module, "ray", fake)
    monkeypatch.setattr(fleet_module, "ENGINE", fake)

    def sleep(seconds: float) -> None:
        fake.now += seconds

    clock = SimpleNamespace(monotonic=lambda: fake.now, sleep=sleep)
    monkeypatch.setattr(fleet_module, "time", clock)
    return fake


def fleet_of(cluster: FakeRay, count: int = 1, **options: Any) -> tuple[Fleet, list[str]]:
    reasons: list[str] = []
    fleet = Fleet(SETTINGS, count, on_event=lambda _, d: reasons.append(d["reason"]), **options)
    return fleet, reasons


def poll_that_stays_open(fleet: Fleet, cluster: FakeRay) -> None:
    cluster.arrive = False
    fleet.poll(0.0)
    cluster.arrive = True


def test_each_request_is_answered_once_whoever_dies(cluster: FakeRay) -> None:
    fleet, reasons = fleet_of(cluster, 2)
    fleet.submit(requests("a", "bb", "ccc", "dddd"))
    first, second = cluster.engines
    assert set(first.requests) | set(second.requests) == {"a", "bb", "ccc", "dddd"}
    first.finish("a")
    assert [r.request_id for r in fleet.poll(1.0)] == ["a"]
    lost = set(first.requests)
    first.fault = RayActorError()
    assert fleet.poll(0.0) == [] and reasons == ["died"]
    successor = cluster.engines[2]
    assert set(successor.requests) == lost
    for engine in (second, successor):
        for name in list(engine.requests):
            engine.finish(name)
    assert {r.request_id for r in fleet.poll(1.0)} == {"bb", "ccc", "dddd"}


def test_responses_lost_with_their_node_are_made_again(cluster: FakeRay) -> None:
    """Large ones lie in the object store of the engine's node until they are fetched."""
    fleet, reasons = fleet_of(cluster)
    fleet.submit(requests("a"))
    cluster.engines[0].poll_fault = ObjectLostError("0" * 56, None, "")
    assert fleet.poll(0.0) == []
    assert reasons == ["died"] and set(cluster.engines[1].requests) == {"a"}


def test_an_engine_that_dies_with_finished_responses_leaves_no_dropped_request(
    cluster: FakeRay,
) -> None:
    """Its successor is sent all that was unanswered, and would make what nobody wants any more:
    the next weight update would find it busy."""
    fleet, _ = fleet_of(cluster)
    fleet.submit(requests("a", "bb"))
    poll_that_stays_open(fleet, cluster)
    cluster.engines[0].finish("a")
    cluster.engines[0].poll_fault = RayActorError()
    assert [r.request_id for r in fleet.interrupt(["a"])] == []
    assert set(cluster.engines[1].requests) == {"bb"}


def test_a_response_under_way_has_an_end_of_waiting(cluster: FakeRay) -> None:
    fleet, reasons = fleet_of(cluster, hang_seconds=30.0)
    fleet.submit(requests("a"))
    poll_that_stays_open(fleet, cluster)
    cluster.engines[0].finish("a")
    cluster.engines[0].poll_fault = GetTimeoutError()
    assert fleet.interrupt(["a"]) == []
    assert reasons == ["gave no answer for 30 seconds"]


def test_nobody_waits_for_an_engine_that_starts_to_drop_its_requests(cluster: FakeRay) -> None:
    """As when a run is asked to stop while an engine is replaced."""
    fleet, _ = fleet_of(cluster)
    fleet.submit(requests("a", "bb"))
    cluster.engines[0].fault, cluster.next_starting = RayActorError(), True
    fleet.poll(0.0)
    before = cluster.now
    assert fleet.interrupt(["a", "bb"]) == []
    assert cluster.now == before
    assert cluster.engines[1].requests == {} and len(cluster.engines) == 2


def test_an_engine_that_dies_when_it_is_to_sleep_has_a_successor_that_sleeps(
    cluster: FakeRay,
) -> None:
    """The trainer needs the memory of all of them."""
    fleet, _ = fleet_of(cluster, 2)
    cluster.engines[1].fault = RayActorError()
    fleet.sleep()
    assert [engine.asked[-1:] for engine in cluster.engines] == [["sleep"]] * 3


def test_a_pause_between_steps_is_no_silence_of_an_engine(cluster: FakeRay) -> None:
    fleet, reasons = fleet_of(cluster, hang_seconds=60.0)
    fleet.submit(requests("a"))
    poll_that_stays_open(fleet, cluster)
    fleet.interrupt(["a"])
    fleet.states()
    cluster.now += 1000.0  # Training.
    fleet.submit(requests("bb"))
    cluster.engines[0].requests.clear()  # It has the message, and has not begun.
    fleet.poll(0.0)
    assert reasons == []
    for _ in range(30):  # But now it makes no step.
        poll_that_stays_open(fleet, cluster)
        cluster.now += 3.0
        fleet.poll(0.0)
    assert [reason.partition(" for")[0] for reason in reasons] == ["made no step"]


def test_engines_that_cannot_start_again_end_the_run_as_failing_ones(
    cluster: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A UserError would end it as a refusal, and without saving."""
    fleet, reasons = fleet_of(cluster, max_restarts=1)

    def refuse(settings: EngineSettings) -> None:
        raise UserError("vLLM cannot run model: too little memory is free")

    monkeypatch.setattr(fleet_member, "VllmEngine", refuse)
    actor: Any = _EngineActor(SETTINGS)
    with pytest.raises(UserError):
        actor.start()
    for work in (lambda: actor.call("sleep"), lambda: actor.poll(0.0)):
        with pytest.raises(EngineError, match=r"could not start: .* too little memory") as told:
            work()
    cluster.engines[0].fault = RayActorError()
    monkeypatch.setattr(
        Engine, "_start", lambda self: setattr(self, "fault", RayTaskError("c", "", told.value))
    )
    with pytest.raises(FleetError, match="2 engine failures"):
        fleet.weights_checksum()
    assert reasons == ["died"]


def test_an_update_that_finds_an_engine_busy_can_be_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    busy: Future[None] = Future()
    busy.set_exception(EngineBusyError("1 requests are running"))
    engine = VllmEngine.__new__(VllmEngine)
    engine._update = engine._stream = None
    monkeypatch.setattr(engine, "_post", lambda work: busy)
    for _ in range(2):
        engine.begin_update(1)
        with pytest.raises(EngineBusyError):
            engine.finish_update()
