"""What of an engine's fate ends this start of the processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prorl_nemo.cluster.policy_group import PolicyError
from prorl_nemo.errors import FaultError, UserError
from prorl_nemo.recipe import load_recipe
from prorl_nemo.training import run as run_module
from prorl_nemo.training.live_view import LiveView
from prorl_nemo.training.metrics import EVENTS, METRICS, RunLog, read_rows
from prorl_nemo.training.run import FAULTS, RestartNeeded, _Run, train
from prorl_nemo.training.run_state import Checkpoints
from prorl_nemo.training.stopping import StopRequested
from prorl_nemo.training.tracking import Tracker

RECIPE = Path(__file__).parents[2] / "recipes" / "smoke" / "resets.yaml"
DETAILS = {"engine": 0, "reason": "died", "resubmitted": 3}


@contextmanager
def a_run(tmp_path: Path, *settings: str, stop: str | None = None) -> Iterator[_Run]:
    recipe = load_recipe(RECIPE, [f"runs_dir={tmp_path}", *settings])
    recipe.run_dir.mkdir()
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    with RunLog(recipe.run_dir) as log, LiveView("run", "model", 1) as view:
        yield _Run(recipe, tmp_path, checkpoints, log, view, lambda seconds: stop, Tracker([]))


def events(tmp_path: Path) -> list[str]:
    return [row["event"] for row in read_rows(tmp_path / "resets" / EVENTS)]


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_new_engine_goes_on_only_where_its_rounding_may_differ(
    tmp_path: Path, deterministic: bool
) -> None:
    with a_run(tmp_path, f"rollout.deterministic={str(deterministic).lower()}") as run:
        if deterministic:
            with pytest.raises(RestartNeeded, match="deterministic"):
                run._event("engine_restarted", DETAILS)
        else:
            run._event("engine_restarted", DETAILS)
        run._event("prompt_dropped", {"prompt_id": "p", "reason": "too long"})
    assert RestartNeeded in FAULTS
    assert events(tmp_path) == ["engine_restarted", "prompt_dropped"]


def test_a_run_that_is_to_stop_does_not_wait_for_new_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm ends all processes of a cancelled job at once, engines and ranks as well."""
    starts = []

    def once(self: _Run, changes: dict[str, Any]) -> bool:
        starts.append(changes)
        raise PolicyError("a trainer rank died")

    monkeypatch.setattr(_Run, "_once", once)
    with a_run(tmp_path, stop="SIGTERM") as run:
        with pytest.raises(StopRequested, match="SIGTERM"):
            run._event("engine_restarted", DETAILS)
        with pytest.raises(UserError, match="SIGTERM: a trainer rank died, before the last step"):
            run.to_the_end({})
    assert len(starts) == 1
    assert events(tmp_path) == ["engine_restarted", "stopped"]


def test_a_fault_restarts_the_processes_until_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def once(self: _Run, changes: dict[str, Any]) -> bool:
        raise PolicyError("a trainer rank died")

    monkeypatch.setattr(_Run, "_once", once)
    with (
        a_run(tmp_path, "faults.max_restarts=2") as run,
        pytest.raises(FaultError, match="2 restarts have not brought the run past step 0"),
    ):
        run.to_the_end({})
    assert events(tmp_path) == ["restarted", "restarted"]


class FirstStart:
    """A trainer without a checkpoint to go on from."""

    step = 0

    def __init__(self, session: None, log: RunLog, *others: Any) -> None:
        self.log = log

    def resume(self) -> bool:
        return False

    def event(self, event: str, **details: Any) -> None:
        self.log.event(event, self.step, **details)

    def run(self) -> None: ...


def test_what_a_first_start_says_before_its_run_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are dropped and the sandbox chosen while the session opens."""

    @contextmanager
    def session(recipe: Any, folder: Path, on_event: Any, on_phase: Any) -> Iterator[None]:
        on_event("sandbox", {"name": "landlock"})
        on_event("prompt_dropped", {"prompt_id": "p", "reason": "too long"})
        yield None

    monkeypatch.setattr(run_module, "open_session", session)
    monkeypatch.setattr(run_module, "Trainer", FirstStart)
    with a_run(tmp_path) as run:
        # Of a start that was killed before its first checkpoint.
        run.log.metrics({"kind": "train", "step": 1})
        run.log.event("cosine_penalty", 1, on=False)
        assert run.to_the_end({})
    assert events(tmp_path) == ["sandbox", "prompt_dropped", "run_started"]
    assert read_rows(tmp_path / "resets" / METRICS) == []


def test_a_run_that_stops_before_its_first_step_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to report on yet; as an error it would look like a refused recipe."""
    monkeypatch.setattr(_Run, "_once", lambda self, changes: False)
    finished, report = train(load_recipe(RECIPE, [f"runs_dir={tmp_path}"]))
    assert not finished and not report.exists()
    assert "has no rows yet" in capsys.readouterr().err
