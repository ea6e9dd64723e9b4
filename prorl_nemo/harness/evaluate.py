"""`prorl eval MODEL`: from what was asked to the figures, resumable at any moment."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.result import BenchmarkResult
from prorl_nemo.evaluation.suite import DEFINITIONS, Changes, Suite, load_suite
from prorl_nemo.harness.endpoint_generator import EndpointGenerator
from prorl_nemo.harness.fleet_generator import EngineOptions, FleetGenerator
from prorl_nemo.harness.generator import Generator
from prorl_nemo.harness.model import Model, find_model
from prorl_nemo.harness.outputs import (
    chosen_numbers,
    reported_name,
    reported_numbers,
    write_results,
)
from prorl_nemo.harness.runner import (
    Times,
    answer_all,
    longest,
    open_graders,
    prompts_sha256,
    render,
)
from prorl_nemo.harness.store import open_store
from prorl_nemo.harness.view import EvaluationView


@dataclass(frozen=True)
class Request:
    """What `prorl eval MODEL` was asked.

    Attributes:
        model: see `model.find_model`.
        out: the evaluation's folder; None: `evals/MODEL-PROTOCOL`.
        reported_as: the model's name in the tables of reported numbers; None: its own.
        beside: models of those tables to compare with; empty: the same model, or else base and
            ProRL v2.
    """

    model: str
    protocol: str = "prorl"
    benchmarks: list[str] = field(default_factory=list)
    step: str | None = None
    data_dir: Path | None = None
    out: Path | None = None
    changes: Changes = field(default_factory=Changes)
    seed: int = 0
    definitions: Path = DEFINITIONS
    engines: EngineOptions = field(default_factory=EngineOptions)
    served_model: str | None = None
    concurrency: int = 32
    workers: int | None = None
    sandbox: str = "auto"
    reported_as: str | None = None
    beside: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """How an evaluation ended. `results` is None if it was stopped before its end."""

    folder: Path
    results: list[BenchmarkResult] | None
    times: Times


def evaluate(request: Request, console: Console) -> Outcome:
    """Evaluate a model, or go on where the same command stopped.

    Raises:
        UserError: whatever a user can do something about, before the engines start if it can be.
    """
    stages: dict[str, float] = {}
    with ExitStack() as stack:
        with _timed(stages, "model"):
            model = find_model(request.model, request.step)
        with _timed(stages, "items"):
            suite = load_suite(
                request.definitions,
                request.protocol,
                request.benchmarks,
                request.data_dir,
                request.changes,
                request.seed,
            )
            reported = reported_numbers(request.definitions)
        own = reported_name(reported, model.name, request.reported_as)
        numbers = chosen_numbers(reported, own, request.beside)
        view = EvaluationView(suite, f"{model.name} under {suite.label}", console)
        generator = _generator(request, model, suite, view)
        stack.callback(generator.close)
        with _timed(stages, "prompts"):
            questions = render(suite, generator)
        identity = {
            **model.identity(),
            "generator": generator.settings(),
            "prompts_sha256": prompts_sha256(questions),
        }
        manifest = suite.manifest(identity)
        folder = request.out or Path("evals") / _folder_name(model.name, suite.label)
        with _timed(stages, "store"):
            store = stack.enter_context(open_store(folder, suite, manifest))
        if store.repaired:
            view.note(f"{folder}: a torn line of {store.repaired} bytes was cut off")
        stop = stack.enter_context(_stop_signals())
        # Before the view opens, so that it is still there when the graders end.
        stack.enter_context(view)
        for row in store.samples.rows() if len(store.samples) else ():
            view.sample(row, fresh=False)
        times = Times()
        if len(store.samples) < suite.total:
            view.phase("graders")
            with _timed(stages, "graders"):
                graders = stack.enter_context(open_graders(suite, request.workers, request.sandbox))
            with _timed(stages, "engines"):
                if len(store.samples) + len(store.ungraded) < suite.total:
                    view.phase("engines")
                    generator.start(longest(questions))
            view.phase("")
            times = answer_all(questions, suite.seed, generator, graders, store, view, stop)
        times.stages = stages
        if len(store.samples) < suite.total:
            return Outcome(folder, None, times)
        store.finish()
        view.phase("figures")
        with _timed(stages, "figures"):
            results = write_results(folder, manifest, suite, numbers, own)
    return Outcome(folder, results, times)


def _generator(request: Request, model: Model, suite: Suite, view: EvaluationView) -> Generator:
    sampling = suite.protocol.sampling
    if model.url is not None:
        return EndpointGenerator(model.url, request.served_model, sampling, request.concurrency)
    if request.served_model is not None:
        raise UserError("--served-model: belongs to a server's URL")
    assert model.folder is not None

    def event(name: str, details: dict[str, Any]) -> None:
        view.note(f"{name.replace('_', ' ')}: {details}")

    return FleetGenerator(model.folder, sampling, request.engines, event)


def _folder_name(*parts: str) -> str:
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.") for part in parts)


@contextmanager
def _timed(stages: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    stages[name] = time.perf_counter() - began


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set by Ctrl-C, SIGTERM and SIGUSR1: what is there is kept. A second signal ends at once."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
