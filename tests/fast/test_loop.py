"""The loop over many kills, in simulated time: what the real engine and trainer have no time for.

The engine is bench/simulated_engine.py. The policy is one number that drifts with the learning
rate, has a momentum, a reference and a KL to it: enough that a forgotten piece of state shows in
the figures. That the real ones resume exactly is shown by tests/slow/test_resume.py.
"""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.simulated_engine import SimulatedFleet, SimulatedGrader, World
from prorl_nemo.data.mixture import PromptStream
from prorl_nemo.data.prompts import RunPrompts
from prorl_nemo.errors import UserError
from prorl_nemo.recipe import Recipe, load_recipe
from prorl_nemo.records import Prompt
from prorl_nemo.reporting.run import read_run
from prorl_nemo.rollout.protocol import GenerationRequest
from prorl_nemo.training.batch import StepSettings, TrainingBatch
from prorl_nemo.training.live_view import LiveView
from prorl_nemo.training.loop import Trainer
from prorl_nemo.training.metrics import EVENTS, METRICS, RunLog, _Appender, read_rows
from prorl_nemo.training.run_state import Checkpoints, FinishSave
from prorl_nemo.training.session import Session
from prorl_nemo.training.stopping import StopRequested

ROOT = Path(__file__).parents[2]


class Killed(Exception):
    """Stands for SIGKILL: the trainer is thrown away as it is."""


class OneNumber:
    """A policy whose only weight is its log-probability of any token, less one."""

    def __init__(self) -> None:
        self.weight = self.reference = self.momentum = 0.0

    def logprobs(self, batch: TrainingBatch, which: str = "policy") -> tuple[list[Any], None]:
        value = self.weight if which == "policy" else self.reference
        return [np.full(len(r), -1.0 - value, dtype=np.float32) for r in batch.responses], None

    def train(self, batch: TrainingBatch, settings: StepSettings) -> list[dict[str, float]]:
        kl = 0.5 * (self.weight - self.reference) ** 2
        push = float(np.mean(np.abs(batch.advantages)))
        self.momentum = 0.9 * self.momentum + 0.1 * push
        self.weight += 1e3 * settings.learning_rate * self.momentum
        tokens = float(batch.response_tokens)
        sums = {"tokens": tokens, "kl_sum": kl * tokens, "ratio_sum": tokens}
        zeros = {"loss_sum": 0.0, "clipped_low_sum": 0.0, "clipped_high_sum": 0.0, "skipped": 0.0}
        return [{**zeros, **sums, "entropy_sum": 0.5 * tokens, "grad_norm": 1.0}]

    def reset_reference(self, clear_optimizer: bool = False) -> None:
        self.reference = self.weight
        if clear_optimizer:
            self.momentum = 0.0

    def load_reference(self, folder: Path) -> None:
        self.reference = json.loads((folder / "numbers.json").read_text())[0]

    def begin_save(self, folder: Path) -> FinishSave:
        text = json.dumps(self.numbers)

        def finish() -> None:
            (folder / "numbers.json").write_text(text)

        return finish

    def load(self, folder: Path) -> None:
        self.weight, self.reference, self.momentum = json.loads(
            (folder / "numbers.json").read_text()
        )

    @property
    def numbers(self) -> list[float]:
        return [self.weight, self.reference, self.momentum]


class Fleet(SimulatedFleet):
    def reset_prefix_cache(self) -> None: ...

    def respond(self, prompt_id: str, request: GenerationRequest) -> tuple[int, str, float]:
        """What is solved changes with the weights, or all validations were the same."""
        length, finish_reason, _ = super().respond(prompt_id, request)
        luck = random.Random(f"{request.seed} {self.weight_version // 2}").random()
        return length, finish_reason, float(luck < self.world.solve_rate(prompt_id))


class Numbers:
    """Prompts 0, 1, 2, ... of a task."""

    size = 5000
    fingerprint = "numbers"

    def __init__(self, task: str) -> None:
        self.task = task

    def prompt(self, slot: int) -> Prompt:
        text = [{"role": "user", "content": f"{self.task} {slot}"}]
        return Prompt(f"{self.task}/{slot}", "logic", self.task, text, [slot + 3], {})


class SimulatedSession(Session):
    def sync_weights(self, version: int) -> None:
        self.version = self.fleet.weight_version = version  # type: ignore[misc]

    def verify_weights(self) -> int:
        return 1

    def hardware_figures(self, batch: TrainingBatch, seconds: float) -> dict[str, float]:
        return {}


def never(seconds: float) -> str | None:
    return None


def trainer_of(
    recipe: Recipe, should_stop: Callable[[float], str | None] = never
) -> tuple[Trainer, OneNumber]:
    sources = recipe.data.sources
    stream = PromptStream(
        [Numbers(s.label) for s in sources], [s.weight for s in sources], recipe.seed
    )
    held_out = [Prompt(f"held/{i}", "logic", "chain_sum", [], [i + 1], {}) for i in range(6)]
    policy = OneNumber()
    session = SimulatedSession(
        recipe,
        Path(),
        policy,  # type: ignore[arg-type]
        Fleet(World(limit=12, median_tokens=6)),  # type: ignore[arg-type]
        SimulatedGrader(),  # type: ignore[arg-type]
        RunPrompts(stream, held_out),
    )
    checkpoints = Checkpoints(recipe.run_dir / "checkpoints", recipe.checkpoint.keep_last)
    view = LiveView("loop", "one number", recipe.total_steps)
    log = RunLog(recipe.run_dir)
    return Trainer(session, log, view, checkpoints, should_stop), policy


def resets(folder: Path, name: str, *overrides: str) -> Recipe:
    recipe = ROOT / "recipes" / "smoke" / "resets.yaml"
    return load_recipe(recipe, [f"runs_dir={folder}", f"name={name}", *overrides])


def figures(recipe: Recipe) -> list[dict[str, Any]]:
    timed = ("time", "throughput/", "memory/")
    rows = read_rows(recipe.run_dir / METRICS)
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def events(recipe: Recipe, name: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(recipe.run_dir / EVENTS) if row["event"] == name]


def run_alone(recipe: Recipe) -> list[float]:
    trainer, policy = trainer_of(recipe)
    trainer.run()
    trainer.checkpoints.close()
    return policy.numbers


def run_killed(recipe: Recipe, seed: int, calls: int) -> tuple[list[float], int]:
    """Killed again and again, each time after up to `calls` questions whether to stop."""
    rng, kills = random.Random(seed), 0
    while True:
        left = rng.randint(1, calls)

        def asked(seconds: float) -> str | None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return None

        trainer, policy = trainer_of(recipe, asked)
        try:
            if not trainer.resume():
                trainer.log.truncate_after(-1)
            trainer.run()
        except Killed:
            kills += 1
            trainer.log.close()
            trainer.checkpoints.close()
            calls += 20  # Or a run that is killed before its first checkpoint would never end.
            continue
        trainer.checkpoints.close()
        return policy.numbers, kills


EARLY_END = (
    "stages=[{steps: 30, ends_when_stalled: 2}, {steps: 10, reset_at_start: true, "
    "samples_per_prompt: 12, reference_reset: {optimizer: clear, warmup_steps: 4}}, {steps: 8}]"
)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["rollout.deterministic=false", "rollout.surplus=carry_over"],
        [EARLY_END, "checkpoint.background=false"],
        [EARLY_END, "rollout.prompt_history={in_a_row: 1}", "checkpoint.interval=3"],
        [
            "reference_reset={source: best, best_margin: 0.0, interval: 5}",
            "stages=[{steps: 30}]",
            "validation.at_start=false",  # Of step 0 there is no checkpoint to take.
            "validation.samples=8",
        ],
    ],
    ids=["resets", "carry over", "early end", "history", "best"],
)
def test_a_run_killed_many_times_ends_as_one_that_never_was(
    tmp_path: Path, overrides: list[str]
) -> None:
    alone, killed = resets(tmp_path, "alone", *overrides), resets(tmp_path, "killed", *overrides)
    expected = run_alone(alone)
    found, kills = run_killed(killed, seed=1, calls=60)
    assert kills >= 5
    assert found == expected
    assert figures(killed) == figures(alone)
    if any("source: best" in override for override in overrides):
        assert "best" in {event["source"] for event in events(alone, "reference_reset")}


def test_every_reset_of_the_smoke_recipe_happens_once(tmp_path: Path) -> None:
    recipe = resets(tmp_path, "alone")
    run_alone(recipe)
    triggers = [(event["trigger"], event["step"]) for event in events(recipe, "reference_reset")]
    assert triggers[:2] == [("interval", 8), ("interval", 16)]
    assert [trigger for trigger, _ in triggers[2:]] == ["kl_spike", "stalled_validation"]
    decisions = events(recipe, "reset_decision")
    # One decision for each step, taken or not.
    assert len(decisions) + len(triggers) == 60
    assert all("kl_median" in event["figures"] for event in decisions)


def test_kl_is_zero_right_after_a_reset(tmp_path: Path) -> None:
    recipe = resets(tmp_path, "alone")
    run_alone(recipe)
    kl = {row["step"]: row["policy/kl"] for row in figures(recipe) if row["kind"] == "train"}
    # The toy measures KL before its update: nothing moved between the reset and that.
    assert kl[9] == kl[17] == 0.0
    assert kl[8] > 0


def test_a_stage_that_stalls_ends_early_and_the_next_opens_with_a_reset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = resets(tmp_path, "alone", EARLY_END)
    run_alone(recipe)
    (ended,) = events(recipe, "stage_ended")
    assert ended["planned_last_step"] == 30
    # Report and terminal count to the last step there is.
    last = figures(recipe)[-1]["step"]
    assert last == recipe.total_steps - (30 - ended["step"]) < recipe.total_steps
    assert replace(read_run(recipe.run_dir), recipe=recipe.model_dump()).total_steps == last
    assert f"[{last}/{last}]" in capsys.readouterr().out
    started = [event["step"] for event in events(recipe, "stage_started")]
    first = ended["step"]
    assert started == [1, first + 1, first + 11]
    (opening,) = [e for e in events(recipe, "reference_reset") if e["trigger"] == "stage_start"]
    assert (opening["step"], opening["optimizer"]) == (first, "clear")
    rates = {row["step"]: row["policy/learning_rate"] for row in figures(recipe) if "stage" in row}
    assert [rates[first + k] / rates[first] for k in range(5)] == [1.0, 0.25, 0.5, 0.75, 1.0]


def test_a_stop_in_mid_batch_saves_the_last_finished_step(tmp_path: Path) -> None:
    alone, stopped = resets(tmp_path, "alone"), resets(tmp_path, "stopped")
    expected = run_alone(alone)
    asked = 0

    def should_stop(seconds: float) -> str | None:
        nonlocal asked
        asked += 1
        return "SIGTERM" if asked > 150 else None

    trainer, _ = trainer_of(stopped, should_stop)
    with pytest.raises(StopRequested):
        trainer.run()
    assert trainer.checkpoints.steps()[-1] == trainer.step
    assert 0 < trainer.step < 60
    trainer.log.close()
    trainer.checkpoints.close()
    again, policy = trainer_of(stopped)
    assert again.resume()
    again.run()
    assert policy.numbers == expected
    assert figures(stopped) == figures(alone)


def test_a_step_without_updates_makes_no_sample_stale(tmp_path: Path) -> None:
    """Its weights are those of the step before, also for a run that goes on from there."""
    recipe = resets(tmp_path, "none", "rollout.deterministic=false", "rollout.surplus=carry_over")
    trainer, _ = trainer_of(recipe)
    for _ in range(3):
        trainer.train_step()
    trainer.step = 4
    trainer.save(last=True)
    trainer.log.close()
    trainer.checkpoints.close()
    again, _ = trainer_of(recipe)
    assert again.resume()
    assert (again.step, again.session.version) == (4, 3)


def replaced_while_stopping(trainer: Trainer, part: Any, name: str, step: int) -> None:
    """As `_Run._event` does where an engine dies over `part.name` of a run that is to stop."""
    work = getattr(part, name)

    def dies(*arguments: Any) -> Any:
        if trainer.updating and trainer.step == step:
            raise StopRequested("SIGTERM")
        return work(*arguments)

    setattr(part, name, dies)


def test_a_stop_amid_updates_ends_with_their_step(tmp_path: Path) -> None:
    """The weights are those of the step under way: saved as the step before, it would be done
    again on top of itself, with other prompts."""
    alone, stopped = resets(tmp_path, "alone"), resets(tmp_path, "stopped")
    expected = run_alone(alone)
    trainer, _ = trainer_of(stopped)
    replaced_while_stopping(trainer, trainer.session, "sync_weights", 12)
    with pytest.raises(StopRequested):
        trainer.run()
    trainer.log.close()
    trainer.checkpoints.close()
    again, policy = trainer_of(stopped)
    assert again.resume()
    assert again.step == 13
    again.run()
    assert policy.numbers == expected
    assert figures(stopped) == figures(alone)


def test_a_stop_in_a_validation_leaves_the_step_whole(tmp_path: Path) -> None:
    recipe = resets(tmp_path, "stopped")
    trainer, policy = trainer_of(recipe)
    replaced_while_stopping(trainer, trainer.sampler, "sample_all", 12)
    with pytest.raises(StopRequested):
        trainer.run()
    trainer.checkpoints.close()
    assert [row["step"] for row in figures(recipe) if row["kind"] == "train"][-1] == 12
    assert events(recipe, "reset_decision")[-1]["step"] == 12
    again, resumed = trainer_of(recipe)
    assert again.resume()
    assert (again.step, resumed.numbers) == (12, policy.numbers)


@pytest.mark.parametrize("part", ["mismatch", "resets", "sampler"])
def test_a_checkpoint_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    recipe = resets(tmp_path, "old")
    trainer, _ = trainer_of(recipe)
    trainer.train_step()
    trainer.save(last=True)
    state = trainer.checkpoints.read_state(1)
    state[part].popitem()
    monkeypatch.setattr(Checkpoints, "read_state", lambda *_: state)
    again, _ = trainer_of(recipe)
    with pytest.raises(UserError, match=r"step_000001: written by another version .* name=NAME"):
        again.resume()


def test_a_damaged_checkpoint_is_said_and_the_one_before_used(tmp_path: Path) -> None:
    alone, broken = resets(tmp_path, "alone"), resets(tmp_path, "broken")
    expected = run_alone(alone)
    run_alone(broken)
    last = sorted((broken.run_dir / "checkpoints").glob("step_*"))[-1]
    (last / "policy" / "numbers.json").write_text("[0, 0, 0]")
    again, policy = trainer_of(broken)
    assert again.resume()
    assert again.step < 60
    again.run()
    again.checkpoints.close()
    (event,) = events(broken, "checkpoint_damaged")
    assert event["damaged_step"] == 60
    assert "numbers.json" in event["reason"]
    assert policy.numbers == expected
    assert figures(broken) == figures(alone)


def test_a_disk_that_is_full_at_a_checkpoint_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = resets(tmp_path, "full", "stages=[{steps: 20}]")
    trainer, policy = trainer_of(recipe)
    begin = policy.begin_save

    def full_at_first(folder: Path) -> FinishSave:
        if trainer.step <= 10:
            (folder / "numbers.json").symlink_to("/dev/full")
        return begin(folder)

    monkeypatch.setattr(trainer.saver, "_begin_policy", full_at_first)
    trainer.run()
    trainer.checkpoints.close()
    failed = events(recipe, "checkpoint_failed")
    assert failed
    assert all("No space left" in event["reason"] for event in failed)
    assert trainer.checkpoints.steps()[-1] == 20
    assert len([row for row in figures(recipe) if row["kind"] == "train"]) == 20


def test_rows_that_a_full_disk_cost_are_said_once_it_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = resets(tmp_path, "rows", "stages=[{steps: 9}]")
    trainer, _ = trainer_of(recipe)
    append = _Appender.append

    def full_in_steps_3_to_5(file: _Appender, line: bytes) -> None:
        if 3 <= trainer.step <= 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(file, line)

    monkeypatch.setattr(_Appender, "append", full_in_steps_3_to_5)
    trainer.run()
    trainer.checkpoints.close()
    (lost,) = events(recipe, "rows_lost")
    assert (lost["step"], lost["of"]) == (6, "diary")
    steps = [row["step"] for row in figures(recipe) if row["kind"] == "train"]
    assert steps == [1, 2, 6, 7, 8, 9]
    # Of each of the three steps at least its metrics, its decision about a reset and, in vain,
    # the event itself.
    assert lost["rows"] == trainer.log.lost_rows >= 9
