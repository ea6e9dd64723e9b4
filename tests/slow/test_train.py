"""`prorl train` and `prorl check` as a user runs them: real model, engine, trainer and graders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prorl_nemo.cli import app
from prorl_nemo.tiny_model import tiny_model

ROOT = Path(__file__).parents[2]
# The quickstart at the smallest size in which everything still happens once.
SMALL = [
    "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=4",
    "algorithm.minibatches=2",
    "validation.prompts_per_task=2",
    "validation.samples=1",
    "validation.interval=4",
    "reference_reset.interval=2",
    "shaping.cosine.on_steps=1",
    "shaping.cosine.off_steps=1",
    "checkpoint.interval=3",
    "stages=[{steps: 2, name: long}, {steps: 2, name: short, max_response_tokens: 16}]",
]


def prorl(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prorl_nemo.cli", *arguments]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def stopped_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run that Slurm stops after its first step, and that the same command finishes.

    SIGTERM, of all signals, because Ray takes that one for itself.
    """
    folder = tmp_path_factory.mktemp("runs")
    command = prorl("train", str(ROOT / "recipes/quickstart.yaml"), f"runs_dir={folder}", *SMALL)
    metrics = folder / "quickstart" / "metrics.jsonl"
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and any(row["kind"] == "train" for row in rows(metrics)):
            os.kill(process.pid, signal.SIGTERM)
            break
        time.sleep(0.2)
    first, _ = process.communicate(timeout=200)
    assert process.returncode == 0, first
    second = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=400, check=False
    )
    assert second.returncode == 0, second.stdout + second.stderr
    return folder / "quickstart", first, second.stdout


def test_interrupted_run_says_how_to_go_on(stopped_and_resumed: tuple[Path, str, str]) -> None:
    _, first, second = stopped_and_resumed
    assert "the same command resumes" in first
    assert "finished" in second
    assert "report.html" in second


def test_every_step_is_logged_once(stopped_and_resumed: tuple[Path, str, str]) -> None:
    run, _, _ = stopped_and_resumed
    logged = rows(run / "metrics.jsonl")
    assert [row["step"] for row in logged if row["kind"] == "train"] == [1, 2, 3, 4]
    assert [row["step"] for row in logged if row["kind"] == "validation"] == [0, 4]
    for step in (1, 2, 3, 4):
        assert (run / "samples" / f"step_{step:06d}.jsonl").exists()


def test_every_rule_left_its_event(stopped_and_resumed: tuple[Path, str, str]) -> None:
    run, _, _ = stopped_and_resumed
    events = rows(run / "events.jsonl")
    happened = [(event["event"], event["step"]) for event in events]
    assert ("reference_reset", 2) in happened
    assert ("reference_reset", 4) in happened
    assert ("stage_started", 3) in happened
    assert [e["on"] for e in events if e["event"] == "cosine_penalty"] == [
        False,
        True,
        False,
        True,
    ]
    names = [event["event"] for event in events]
    assert names.count("run_started") == 1
    assert names.count("stopped") == 1
    assert names.count("resumed") == 1
    assert names[-1] == "finished"


def test_stage_change_shortens_responses(stopped_and_resumed: tuple[Path, str, str]) -> None:
    run, _, _ = stopped_and_resumed
    train = [row for row in rows(run / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["rollout/response_limit"] for row in train] == [24, 24, 16, 16]
    assert all(row["rollout/response_tokens_max"] <= row["rollout/response_limit"] for row in train)


def test_kl_starts_again_after_a_reset(stopped_and_resumed: tuple[Path, str, str]) -> None:
    """Step 2 ends with a reset. Step 3 is measured against the new reference, so its KL is that
    of its own updates, although the policy is further from the start than ever."""
    run, _, _ = stopped_and_resumed
    kl = {
        row["step"]: row["policy/kl"]
        for row in rows(run / "metrics.jsonl")
        if row["kind"] == "train"
    }
    assert kl[3] < kl[2]


def test_engine_and_trainer_agree(stopped_and_resumed: tuple[Path, str, str]) -> None:
    run, _, _ = stopped_and_resumed
    train = [row for row in rows(run / "metrics.jsonl") if row["kind"] == "train"]
    # bf16; a stale head or a wrong temperature gives 0.1 to 5.
    assert all(row["mismatch/mean_abs"] < 0.06 for row in train)
    assert all(row["policy/skipped_updates"] == 0 for row in train)


# Some layouts; `python -m tools.check_table` runs all families in all layouts of the policy.
CHECKED = {
    "llama": [
        "policy.tensor_parallel=2",
        "policy.sequence_parallel=true",
        "policy.pipeline_parallel=2",
    ],
    "qwen2": ["rollout.tensor_parallel=2"],
    "qwen3": [
        "policy.context_parallel=2",
        "policy.data_parallel=2",
        "policy.shared_prompts=false",
    ],
}


@pytest.mark.parametrize("family", CHECKED)
def test_check_passes_in_a_parallel_layout(family: str, one_ray: None, tmp_path: Path) -> None:
    """fp32, temperature 1.2, once with a tied and once with an output matrix of its own."""
    model = tiny_model(family, tmp_path / "model", tied=family == "llama", layers=4)
    found = tmp_path / "check.json"
    command = [
        "check",
        str(ROOT / "recipes/quickstart.yaml"),
        f"model={model}",
        f"runs_dir={tmp_path}",
        "policy.precision=fp32",
        "policy.threads=1",
        *CHECKED[family],
        "rollout.temperature=1.2",
        "data.max_prompt_tokens=1024",
        "--json",
        str(found),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, (done.output, done.exception)
    lines = json.loads(found.read_text())
    assert all(line["ok"] for line in lines)
    names = " ".join(line["name"] for line in lines)
    for what in (
        "transformers",
        "before an update",
        "after an update",
        "gradient norm",
        "output head",
        "grader",
        "reset",
    ):
        assert what in names
