"""A run that is killed again and again must end as one that never was: bit for bit.

`python tests/kill/killed_run.py --kills 12 --folder DIR` (`make test-kill`) trains the tiny model
of recipes/smoke/resets.yaml twice for the same steps, in three stages and over several reference
resets. One run is left alone. The other is ended with SIGKILL at random moments of every phase,
and started again by the same command. Then policy, optimizer, reference, the rest of the state,
metrics and samples of the two are compared; only times and memory may differ.

With `--seconds` it stops between two kills when that time is nearly over, with exit status 3; the
same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare_runs import compare, counts
from real_run import ENGINE, PHASES, RANK, RealRun, events_of

# A trainer rank and an engine: the run must go on by itself without them.
ACTORS = (RANK, ENGINE)
# What a piece of the test is taken to need, when the time may not suffice for it.
KILL_SECONDS, WHOLE_SECONDS = 90.0, 270.0


class NotYet(Exception):
    """The time is over; the same command goes on."""


def overrides(runs_dir: Path, steps: int) -> list[str]:
    """Three stages of a third of the steps; resets twice in each of the first two."""
    third = steps // 3
    interval = max(2, third // 2)
    rules = f"{{interval: {interval}, kl_factor: null, stalled_evaluations: null, cooldown: 0}}"
    stages = (
        f"[{{steps: {third}}}, "
        f"{{steps: {third}, max_response_tokens: 24, samples_per_prompt: 12}}, "
        f"{{steps: {steps - 2 * third}, temperature: 0.9, weights: {{chain_sum: 1.0}}}}]"
    )
    return [
        f"runs_dir={runs_dir}",
        f"stages={stages}",
        f"reference_reset={rules}",
        "checkpoint.interval=2",
        "validation.interval=3",
        "validation.prompts_per_task=4",
    ]


def strike(
    run: RealRun, phase: str, delay: float, target: str | None = None, latest: float = float("inf")
) -> str | None:
    """SIGKILL `delay` seconds into a phase; the phase it was in, None if the run has ended.

    Args:
        target: the Ray actor whose process is killed; None: the whole run.
        latest: the step by which it is killed in any case: on a fast machine a phase can be over
            before it is seen.
    """
    deadline = time.monotonic() + 120
    while run.running:
        seen = run.phase == phase or (phase == "writing" and run.writes())
        if seen or run.step() >= latest:
            time.sleep(delay)
            found = "writing" if run.writes() else run.phase
            if not run.running:
                return None
            os.kill(run.actors(target)[0] if target else run.popen.pid, signal.SIGKILL)
            if not target:
                run.popen.wait()
            return found
        if time.monotonic() > deadline:
            raise SystemExit(f"the run did not reach the phase {phase} in time; see {run.log}")
        time.sleep(0.002)
    return None


class KillTest:
    """The two runs in a folder, and what is known of them so far (`progress.json` there)."""

    def __init__(self, folder: Path, steps: int, kills: int, seed: int, seconds: float) -> None:
        self.folder, self.steps, self.kills, self.seed = folder, steps, kills, seed
        self.started, self.seconds = time.monotonic(), seconds
        folder.mkdir(parents=True, exist_ok=True)
        asked = {"steps": steps, "kills": kills, "seed": seed}
        self.progress: dict[str, Any] = {"asked": asked, "happened": [], "seconds": 0.0}
        if (folder / "progress.json").exists():
            self.progress = json.loads((folder / "progress.json").read_text())
        if self.progress["asked"] != asked:
            raise SystemExit(f"{folder} was begun with {self.progress['asked']}; take another")
        self.before = self.progress["seconds"]

    @property
    def happened(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.progress["happened"]
        return found

    @property
    def killed(self) -> int:
        """How often the whole run was ended."""
        return sum("actor" not in kill for kill in self.happened)

    def note(self, **changes: Any) -> None:
        self.progress |= changes
        self.progress["seconds"] = round(self.before + time.monotonic() - self.started)
        (self.folder / "progress.json").write_text(json.dumps(self.progress, indent=1))

    def piece(self, seconds: float) -> None:
        """Begin something that takes so long, if the time suffices."""
        if time.monotonic() - self.started + seconds > self.seconds:
            raise NotYet

    def start(self, name: str) -> RealRun:
        settings = overrides(self.folder / name, self.steps)
        return RealRun(settings, self.folder / f"{name}.log")

    def alone(self) -> None:
        """The run that is left alone; begun anew if it was not finished."""
        if "seconds_alone" in self.progress:
            return
        self.piece(WHOLE_SECONDS)
        started = time.monotonic()
        with self.start("alone") as run:
            _finish(run)
        assert not events_of(run.folder, "resumed")
        self.note(seconds_alone=round(time.monotonic() - started))

    def kill(self, number: int) -> bool:
        """Start the run and end it once. Whether there was a run to end."""
        self.piece(KILL_SECONDS)
        rng = random.Random(f"{self.seed}/{number}")
        # Every phase in turn, in an order drawn anew each round.
        order = random.Random(f"{self.seed}/round {number // len(PHASES)}")
        phase = order.sample(PHASES, len(PHASES))[number % len(PHASES)]
        with self.start("killed") as run:
            while run.running and run.phase not in PHASES:
                time.sleep(0.02)
            # Some kills at once, so that the same step is struck twice; others after some steps,
            # unless none would be left for the last kills.
            last = self.steps * (number + 1) // (self.kills + len(ACTORS) + 1)
            wanted = min(run.step() + rng.choice([0, 2, 4]), last)
            while run.running and run.step() < wanted:
                time.sleep(0.01)
            found = strike(run, phase, rng.uniform(0.0, 0.3), latest=run.step() + 2)
        if found is None:
            return False
        saved = sorted(p.name for p in (run.folder / "checkpoints").glob("step_*"))
        self._happened({"wanted": phase, "phase": found, "last_checkpoint": saved[-1:]})
        return True

    def last_start(self, actors: Sequence[str]) -> Path:
        """The run to its end, losing one actor after the other; its folder."""
        self.piece(WHOLE_SECONDS)
        rng = random.Random(f"{self.seed}/actors")
        with self.start("killed") as run:
            before = len(events_of(run.folder, "restarted"))
            for restarts, actor in enumerate(actors, start=before):
                phase = rng.choice(["generate", "train"]) if actor == RANK else "generate"
                run.wait_until(lambda count=restarts: self._trains_again(run, count))
                found = strike(run, phase, 0.05, actor)
                if found is None:
                    break
                self._happened({"wanted": phase, "phase": found, "actor": actor})
            _finish(run)
        self.note()
        return run.folder

    @staticmethod
    def _trains_again(run: RealRun, restarts: int) -> bool:
        return len(events_of(run.folder, "restarted")) >= restarts and run.phase in PHASES

    def _happened(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), flush=True)
        self.note(happened=[*self.happened, what])


def _finish(run: RealRun) -> None:
    if code := run.finish(900):
        raise SystemExit(f"the run ended with {code}:\n{run.output()}")


def killed_run(
    folder: Path,
    steps: int,
    kills: int,
    seed: int,
    actors: Sequence[str] = ACTORS,
    seconds: float = float("inf"),
) -> dict[str, Any]:
    """Both runs, and what was found.

    Args:
        folder: new or empty; or of the same test, which then goes on.
        kills: of the whole run.
        actors: killed one after the other in the last start, which goes on by itself.
        seconds: for this call.

    Raises:
        NotYet: they did not suffice.
    """
    test = KillTest(folder, steps, kills, seed, seconds)
    test.alone()
    while test.killed < kills and test.kill(test.killed):
        pass
    run, alone = test.last_start(actors), folder / "alone" / "resets"
    differences = compare(alone, run)
    names = [event["event"] for event in events_of(run)]
    return {
        "steps": steps,
        "kills": test.happened,
        "restarts_by_itself": names.count("restarted"),
        "reference_resets": names.count("reference_reset"),
        "stage_changes": names.count("stage_started") - 1,
        "compared": counts(alone),
        "differences": differences,
        "seconds": test.progress["seconds"],
        "seconds_alone": test.progress["seconds_alone"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True, help="for both runs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of this call, at most")
    parser.add_argument("--json", type=Path, help="write the summary here")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Ends the run too.
    try:
        found = killed_run(
            arguments.folder,
            arguments.steps,
            arguments.kills,
            arguments.seed,
            seconds=arguments.seconds,
        )
    except NotYet:
        print("not done yet; the same command goes on")
        sys.exit(3)
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")
    expected = arguments.kills + len(ACTORS)
    missing = len(found["kills"]) < expected
    if missing:
        print(f"only {len(found['kills'])} of {expected} kills happened: use more --steps")
    # Also after an engine's death: in deterministic mode a new one must not go on in its place.
    alone = found["restarts_by_itself"] != len(ACTORS)
    if alone:
        print(f"{found['restarts_by_itself']} restarts by itself, expected {len(ACTORS)}")
    sys.exit(bool(found["differences"]) or missing or alone)


if __name__ == "__main__":
    main()
