"""A run whose engine dies too often: `prorl train` saves what it has, stops, and can go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
COMMAND = [
    *(sys.executable, "-m", "prorl_nemo.cli", "train", str(ROOT / "recipes/smoke/resets.yaml")),
    "rollout.deterministic=false",
    "rollout.surplus=carry_over",
    "rollout.prompt_history={in_a_row: 1}",
    "rollout.verify_weights_every=1",
    "validation.at_start=false",
    "validation.interval=1000",
]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def engine_of(run: subprocess.Popen[str]) -> psutil.Process:
    children = psutil.Process(run.pid).children(recursive=True)
    (engine,) = [c for c in children if c.name().startswith("ray::_EngineAct")]
    return engine


def train_until(folder: Path, steps: int, *overrides: str) -> subprocess.Popen[str]:
    """A run, once it has logged so many steps."""
    run = subprocess.Popen(
        [*COMMAND, f"runs_dir={folder}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    metrics = folder / "resets" / "metrics.jsonl"
    while run.poll() is None and len(rows(metrics)) < steps:
        time.sleep(0.1)
    return run


def test_a_run_whose_engine_dies_too_often_is_saved_and_goes_on(tmp_path: Path) -> None:
    run = train_until(tmp_path, 3, "rollout.max_engine_restarts=0")
    engine_of(run).send_signal(signal.SIGKILL)
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 4, output
    assert "rollout.max_engine_restarts: engine 0 died" in " ".join(output.split())
    folder = tmp_path / "resets"
    done = [row["step"] for row in rows(folder / "metrics.jsonl")]
    events = rows(folder / "events.jsonl")
    assert events[-1]["event"] == "stopped"
    assert (folder / "checkpoints" / f"step_{done[-1]:06d}" / "state.json").exists()
    verified = [event["step"] for event in events if event["event"] == "weights_verified"]
    # Each step's but perhaps the last one's: the engine may have died over it.
    assert len(verified) >= len(done) - 1
    assert all(event["tensors"] > 10 for event in events if event["event"] == "weights_verified")

    run = train_until(tmp_path, len(done) + 2)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 0, output
    steps = [row["step"] for row in rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= len(done) + 2
