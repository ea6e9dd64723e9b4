"""A study of a few steps, end to end: stopped in a run, begun again, and nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from prorl_nemo.errors import UserError
from prorl_nemo.study.compact import read_result
from prorl_nemo.study.plan import Study
from prorl_nemo.study.runner import FIRST_PROBE, run_study

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
PRETRAINING: dict[str, Any] = {
    "name": "study-pretrain",
    "shape": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "layers": 2,
        "heads": 2,
        "kv_heads": 1,
        "vocab_size": 320,
    },
    "policy": {"optimizer": {"learning_rate": 1.0e-2, "warmup_steps": 2}},
    "tasks": [
        {"task": "chain_sum", "problems": 60, "config": SUMS},
        {"task": "products", "problems": 40, "config": {"min_digits": 1, "max_digits": 1}},
    ],
    "worked_share": 0.0,
    "steps": 60,
    "problems_per_step": 32,
    "exam": {"interval": 60, "problems_per_task": 8},
}
RECIPE: dict[str, Any] = {
    "name": "study-main",
    "model": "replaced by the study's",
    "policy": {"optimizer": {"learning_rate": 1.0e-4}},
    "algorithm": {"minibatches": 2},
    "rollout": {
        "prompts_per_step": 4,
        "samples_per_prompt": 8,
        "max_response_tokens": 12,
        "temperature": 1.0,
        "kv_cache_mib": 64,
    },
    "data": {
        "max_prompt_tokens": 160,
        "sources": [
            {"task": "chain_sum", "size": 200, "config": SUMS},
            {"task": "products", "train": False, "config": {"min_digits": 1, "max_digits": 1}},
        ],
    },
    "validation": {"interval": 2, "prompts_per_task": 2, "samples": 2, "temperature": 1.0},
    "reference_reset": {"interval": 2, "cooldown": 0},
    "checkpoint": {"interval": 2, "keep_last": 1},
    "stages": [{"steps": 6}],
}


def write_study(folder: Path) -> Study:
    for name, raw in (("pretrain", PRETRAINING), ("main", RECIPE)):
        text = yaml.safe_dump({**raw, "runs_dir": str(folder / "runs")})
        (folder / f"{name}.yaml").write_text(text)
    return Study.model_validate(
        {
            "pretraining": str(folder / "pretrain.yaml"),
            "model": str(folder / "study" / "model"),
            "recipe": str(folder / "main.yaml"),
            "results": str(folder / "study" / "results"),
            "compare_at": 2,
            "probe": {"prompts_per_task": 2, "samples": 8},
            "variants": [
                {"name": "main", "question": "All", "seeds": [1]},
                {
                    "name": "no_kl",
                    "question": "Without KL",
                    "overrides": ["algorithm.kl.coefficient=0.0", "stages=[{steps: 2}]"],
                    "seeds": [1],
                },
            ],
        }
    )


def stop_after(rows: int, metrics: Path) -> None:
    """SIGTERM to this process, as Slurm sends it, once so many rows are there."""
    while not metrics.exists() or len(metrics.read_text().splitlines()) < rows:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_study_stopped_and_begun_again(tmp_path: Path, one_ray: None) -> None:
    study, console = write_study(tmp_path), Console()
    results = Path(study.results)

    metrics = tmp_path / "runs" / "study-main-seed1" / "metrics.jsonl"
    stopper = threading.Thread(target=stop_after, args=(3, metrics))
    stopper.start()
    assert not run_study(study, [], console)
    stopper.join()
    assert Path(study.model).is_dir() and (results / FIRST_PROBE).is_file()
    assert read_result(study.result_file("main", 1)) is None

    assert run_study(study, [], console)
    main, no_kl = (read_result(study.result_file(name, 1)) for name in ("main", "no_kl"))
    assert main is not None and no_kl is not None
    assert (main["steps"], no_kl["steps"]) == (6, 2)
    assert main["starts"]["begun"] == 2 and main["starts"]["stopped"] == 1
    assert main["starts"]["killed"] == 0 and len(main["starts"]["resumed_at"]) == 1
    assert main["model_sha256"] == no_kl["model_sha256"]
    assert main["validation"]["step"] == [0, 2, 4, 6]
    assert {"mean", "pass", "never_trained/mean", "pass/products"} <= set(main["validation"])
    assert {"policy/kl", "policy/entropy", "time/step"} <= set(main["train"])
    assert [event["step"] for event in main["events"] if event["event"] == "reference_reset"]
    # Of each task two prompts, each asked eight times; the variant is not asked.
    assert no_kl["probe"] is None
    for when in ("start", "end"):
        counts = main["probe"][when]
        assert len(counts) == 4 and all(0 <= count <= 8 for count in counts.values())
    assert main["probe"]["start"] == json.loads((results / FIRST_PROBE).read_text())["counts"]
    assert str(tmp_path) not in (results / "README.md").read_text()
    assert (results / "study.html").is_file() and (results / "differences.svg").is_file()

    # All there is to do is done: another call starts nothing, also without the runs' folders.
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    began = time.monotonic()
    assert run_study(study, [], console)
    assert time.monotonic() - began < 30 and not (tmp_path / "runs").exists()

    # With its model gone, a missing result cannot be made beside the others.
    study.result_file("no_kl", 1).unlink()
    Path(study.model).rename(tmp_path / "model")
    with pytest.raises(UserError, match="restore the folder"):
        run_study(study, [], console)
    (tmp_path / "model").rename(study.model)
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump({**PRETRAINING, "steps": 61}))
    with pytest.raises(UserError, match=r"(?s)made by another recipe.*steps: 60 there, 61 now"):
        run_study(study, [], console)
