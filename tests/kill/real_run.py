"""A run of `prorl train` in a process of its own, watched and struck from outside.

For the kill test and tests/faults: real model, trainer, engine and graders, at the size of
recipes/smoke/resets.yaml, where a step takes about a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smoke" / "resets.yaml"
RANK, ENGINE = "_RankActor", "_EngineActor"
# The phases of a step as the process title tells them. `writing` is a checkpoint that is being
# written, whatever training does meanwhile.
PHASES = ("generate", "logprobs", "reference", "train", "sync", "validate", "writing")


class RealRun:
    """One start of the run. Ended, whatever happens, when the block is left.

    Args:
        settings: overrides of the recipe, `runs_dir=` among them.
        log: what the process prints is added to it.
        environment: beside that of the test.
    """

    def __init__(
        self,
        settings: list[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        recipe: Path = RECIPE,
    ) -> None:
        self.started = time.time()
        self.log = log
        folder = next(s.removeprefix("runs_dir=") for s in settings if s.startswith("runs_dir="))
        self.folder = Path(folder) / recipe.stem
        command = [sys.executable, "-m", "prorl_nemo.cli", "train", str(recipe), *settings]
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def __enter__(self) -> RealRun:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    @property
    def title(self) -> str:
        """What the process calls itself: `prorl NAME: step N, PHASE`; empty before and after."""
        try:
            title = Path(f"/proc/{self.popen.pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            return ""
        return title if title.startswith("prorl ") else ""

    @property
    def phase(self) -> str:
        return self.title.rpartition(", ")[2]

    def writes(self) -> bool:
        """Whether a checkpoint is being written; one that an earlier start left does not count."""
        with contextlib.suppress(FileNotFoundError):
            aside = (self.folder / "checkpoints").glob("writing_*")
            return any(f.stat().st_mtime > self.started for f in aside)
        return False

    def actors(self, name: str) -> list[int]:
        """Process ids of the Ray actors of a class."""
        found = []
        for child in psutil.Process(self.popen.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                if child.cmdline()[0].startswith(f"ray::{name}"):
                    found.append(child.pid)
        return found

    def wait_until(self, condition: Callable[[], bool], seconds: float = 150.0) -> None:
        """Wait for a condition.

        Raises:
            AssertionError: the run ended before, or it took too long.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.running, f"the run ended:\n{self.output()}"
            assert time.monotonic() < deadline, f"in vain for {seconds:.0f} s:\n{self.output()}"
            time.sleep(0.01)

    def wait_for_step(self, step: int, seconds: float = 150.0) -> None:
        """Wait until the metrics of a step are written."""
        self.wait_until(lambda: self.step() >= step, seconds)

    def wait_for_event(self, event: str, count: int = 1, seconds: float = 150.0) -> None:
        self.wait_until(lambda: len(events_of(self.folder, event)) >= count, seconds)

    def step(self) -> int:
        """The last step whose metrics are written."""
        return max((row["step"] for row in rows_of(self.folder)), default=0)

    def finish(self, seconds: float = 300.0) -> int:
        """Exit status, once it has ended."""
        try:
            return self.popen.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            message = f"the run did not end in {seconds:.0f} s:\n{self.output()}"
            raise AssertionError(message) from None

    def output(self) -> str:
        """The end of what it has printed, in one line's words: messages are wrapped."""
        return " ".join(self.log.read_text(errors="replace")[-3000:].split())


def short_run(steps: int) -> list[str]:
    """Settings of a run of one stage, saved after every second step and validated at its end."""
    return [
        f"stages=[{{steps: {steps}}}]",
        "validation.at_start=false",
        "validation.interval=1000",
        "checkpoint.interval=2",
    ]


def events_of(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The events of a run, of one name or all."""
    return [row for row in _rows(folder / "events.jsonl") if event in (None, row["event"])]


def rows_of(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The metrics rows of a run of one kind."""
    return [row for row in _rows(folder / "metrics.jsonl") if row["kind"] == kind]


def _rows(path: Path) -> list[dict[str, Any]]:
    """Of a file that may be written right now: the last line may be half there."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
