"""A run that is killed again and again must end as one that never was: bit for bit.

`python tests/kill/killed_run.py --kills 12` (`make test-kill`) trains the tiny model of
recipes/smoke/resets.yaml twice for the same steps, in three stages and over several reference
resets. One run is left alone. The other is ended with SIGKILL at random moments of every phase,
and started again by the same command. Then policy, optimizer, reference, the rest of the state,
metrics and samples of the two are compared; only times may differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smoke" / "resets.yaml"
# The phases of the run as its process title tells them. `writing` is a checkpoint that is being
# written, whatever training does meanwhile.
PHASES = ("generate", "logprobs", "reference", "train", "sync", "validate", "writing")


# A trainer rank and an engine: the run must go on by itself without them.
ACTORS = ("_RankActor", "_EngineActor")


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


class Process:
    """One start of the run."""

    def __init__(self, settings: list[str], log: Path) -> None:
        self.started = time.time()
        command = [sys.executable, "-m", "prorl_nemo.cli", "train", str(RECIPE), *settings]
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()

    @property
    def phase(self) -> str:
        """The phase its title names; empty when it has none yet, or has ended."""
        try:
            title = Path(f"/proc/{self.popen.pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            return ""
        return title.rpartition(", ")[2] if title.startswith("prorl ") else ""

    def actor(self, name: str) -> int:
        """Process id of a Ray actor of the run."""
        for child in psutil.Process(self.popen.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                if child.cmdline()[0].startswith(f"ray::{name}"):
                    return child.pid
        raise SystemExit(f"the run has no process {name}")

    def kill_in(
        self, phase: str, delay: float, checkpoints: Path, deadline: float, target: str = "run"
    ) -> str | None:
        """SIGKILL `delay` seconds into a phase; the phase it was in, None if the run has ended.

        Args:
            target: `run`, the whole of it; or the Ray actor whose process is killed.
        """
        while time.monotonic() < deadline:
            if self.popen.poll() is not None:
                return None
            if self.phase == phase or (phase == "writing" and self.writes(checkpoints)):
                time.sleep(delay)
                found = "writing" if self.writes(checkpoints) else self.phase
                if self.popen.poll() is not None:
                    return None
                if target == "run":
                    os.kill(self.popen.pid, signal.SIGKILL)
                    self.popen.wait()
                else:
                    os.kill(self.actor(target), signal.SIGKILL)
                return found
            time.sleep(0.002)
        raise SystemExit(f"the run did not reach the phase {phase} in time")

    def writes(self, checkpoints: Path) -> bool:
        """Whether a checkpoint is being written; one that an earlier start left does not count."""
        with contextlib.suppress(FileNotFoundError):
            return any(f.stat().st_mtime > self.started for f in checkpoints.glob("writing_*"))
        return False


def finish(process: Process, log: Path, seconds: float) -> None:
    with process:
        try:
            code = process.popen.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"the run did not end in {seconds:.0f} s; see {log}") from None
    if code:
        raise SystemExit(f"the run ended with {code}:\n{log.read_text()[-3000:]}")


def killed_run(
    folder: Path, steps: int, kills: int, seed: int, actors: Sequence[str] = ACTORS
) -> dict[str, Any]:
    """Both runs, and what was found.

    Args:
        folder: new or empty.
        kills: of the whole run.
        actors: killed one after the other in the last start, which goes on by itself.
    """
    rng = random.Random(seed)
    started = time.monotonic()
    alone, killed = folder / "alone", folder / "killed"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "alone.log"
    finish(Process(overrides(alone, steps), log), log, 900)
    alone_seconds = time.monotonic() - started

    run, log = killed / "resets", folder / "killed.log"
    # Every phase in turn, in an order drawn anew each round.
    wanted: list[str] = []
    while len(wanted) < kills:
        wanted += rng.sample(PHASES, len(PHASES))
    happened = []
    for phase in wanted[:kills]:
        with Process(overrides(killed, steps), log) as process:
            while process.popen.poll() is None and process.phase not in PHASES:
                time.sleep(0.02)
            # Some kills at once, so that the same step is struck twice; most after a step or two.
            time.sleep(rng.choice([0.0, 2.0, 4.0]))
            found = process.kill_in(
                phase, rng.uniform(0.0, 0.3), run / "checkpoints", time.monotonic() + 120
            )
        if found is None:
            break
        steps_saved = sorted(p.name for p in (run / "checkpoints").glob("step_*"))
        kill = {"wanted": phase, "phase": found, "last_checkpoint": steps_saved[-1:]}
        happened.append(kill)
        print(json.dumps(kill), flush=True)
    with Process(overrides(killed, steps), log) as process:
        for restarts, actor in enumerate(actors):
            phase = rng.choice(["generate", "train"]) if actor == ACTORS[0] else "generate"
            deadline = time.monotonic() + 120
            while len(events_of(run, "restarted")) < restarts or process.phase not in PHASES:
                if time.monotonic() > deadline or process.popen.poll() is not None:
                    raise SystemExit(f"the run did not start anew; see {log}")
                time.sleep(0.05)
            found = process.kill_in(phase, 0.05, run / "checkpoints", deadline, actor)
            if found is None:
                break
            happened.append({"wanted": phase, "phase": found, "actor": actor})
            print(json.dumps(happened[-1]), flush=True)
        finish(process, log, 900)
    differences = compare(alone / "resets", run)
    names = [event["event"] for event in events_of(run)]
    return {
        "steps": steps,
        "kills": happened,
        "restarts_by_itself": names.count("restarted"),
        "reference_resets": names.count("reference_reset"),
        "stage_changes": names.count("stage_started") - 1,
        "compared": {**counts(alone / "resets")},
        "differences": differences,
        "seconds": round(time.monotonic() - started),
        "seconds_alone": round(alone_seconds),
    }


def events_of(run: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The events of a run, of one name or all; the last line may be half written."""
    path = run / "events.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [row for row in found if event is None or row["event"] == event]


def compare(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs; times aside."""
    found = []
    for name, read in (("metrics", metrics), ("samples", samples), ("state", state)):
        a, b = read(one), read(other)
        if a != b:
            found += [f"{name}: {key}" for key in a if a[key] != b.get(key)] or [name]
    a, b = tensors(one), tensors(other)
    if set(a) != set(b):
        found.append(f"tensors: {sorted(set(a) ^ set(b))[:5]}")
    found += [f"tensor {key}" for key in a if key in b and not same_bits(a[key], b[key])]
    return found


def same_bits(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()


def counts(run: Path) -> dict[str, int]:
    found = tensors(run)
    return {
        "tensors": sum(isinstance(t, torch.Tensor) for t in found.values()),
        "numbers": sum(t.numel() for t in found.values() if isinstance(t, torch.Tensor)),
        "metrics_rows": len(metrics(run)),
        "sample_files": len(samples(run)),
    }


def metrics(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        f"{row['kind']} {row['step']} (row {number})": {
            key: value
            for key, value in row.items()
            if key != "time" and not key.startswith(("time/", "throughput/"))
        }
        for number, row in enumerate(rows)
    }


def samples(run: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted((run / "samples").iterdir())}


def state(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((last_checkpoint(run) / "state.json").read_text())
    found.pop("recipe")  # Of another runs_dir.
    found.pop("log")  # Sizes of files with times in them.
    found["last_validation"] = {
        key: value for key, value in found["last_validation"].items() if not key.startswith("time")
    }
    return found


def tensors(run: Path) -> dict[str, Any]:
    """Every tensor of the last checkpoint: policy, optimizer and reference; and Adam's count."""
    folder = last_checkpoint(run) / "policy"
    found: dict[str, Any] = {}
    _load_state_dict(
        found,
        storage_reader=FileSystemReader(folder),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    common = torch.load(folder / "common.pt", weights_only=True)
    return found | {"adam_step": common["adam_step"]}


def last_checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True, help="for both runs; new")
    parser.add_argument("--json", type=Path, help="write the summary here")
    arguments = parser.parse_args()
    found = killed_run(arguments.folder, arguments.steps, arguments.kills, arguments.seed)
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")
    expected = arguments.kills + len(ACTORS)
    missing = len(found["kills"]) < expected
    if missing:
        print(f"only {len(found['kills'])} of {expected} kills happened: use more --steps")
    sys.exit(bool(found["differences"]) or missing)


if __name__ == "__main__":
    main()
