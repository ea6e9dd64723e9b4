"""`prorl eval` with the real engine: killed and resumed, on more engines, graded again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prorl_nemo.harness.again import regrade
from prorl_nemo.harness.evaluate import Request, evaluate
from prorl_nemo.harness.fleet_generator import EngineOptions
from prorl_nemo.strict_yaml import dump_yaml

ITEMS, SAMPLES, AT_ONCE = 20, 4, 4
SAMPLING = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 20}
SUMS: dict[str, Any] = {
    "name": "sums",
    "title": "Sums",
    "domain": "logic",
    "data": {
        "origin": "generated",
        "name": "reasoning-gym",
        "revision": "0.1.25",
        "reader": "reasoning_gym",
        "licence": "Apache-2.0",
        "items": ITEMS,
        "sha256": None,
        "tasks": ["basic_arithmetic", "chain_sum"],
        "items_per_task": ITEMS // 2,
    },
    "prompt": "{problem}\nGive the final answer between <answer> and </answer>.",
    "extraction": "answer_tags",
    "grader": "reasoning_gym",
    "metric": "continuous",
    "samples": SAMPLES,
    "sampling": SAMPLING,
    "source": "ours",
}


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("definitions")
    protocol = {"name": "tiny", "title": "Tiny", "samples": SAMPLES, "source": "ours"}
    for kind, content in (("benchmarks", SUMS), ("protocols", {**protocol, "sampling": SAMPLING})):
        (folder / kind).mkdir()
        (folder / kind / f"{content['name']}.yaml").write_text(dump_yaml(content))
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "samples.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda r: (r["item"], r["sample"]))


def test_killed_and_resumed_it_equals_one_on_two_engines_that_was_not(
    definitions: Path, one_ray: None, tmp_path: Path
) -> None:
    """As evaluations are by default: what is computed beside a sample does not change it."""
    out, whole = tmp_path / "killed", tmp_path / "whole"
    options = {"--protocol": "tiny", "--kv-cache-mib": "64",
               "--max-sequences": str(AT_ONCE), "--workers": "1", "--engines": "1"}  # fmt: skip
    arguments = [part for pair in options.items() for part in pair]
    command = [sys.executable, "-m", "prorl_nemo.cli", "eval", "tiny-arithmetic", *arguments,
               "--definitions", str(definitions), "--out", str(out)]  # fmt: skip
    samples = out / "samples.jsonl"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if samples.exists() and samples.read_bytes().count(b"\n") >= 8:
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    output = process.communicate()[0]
    kept = samples.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 8 <= kept.count(b"\n") < ITEMS * SAMPLES, output

    def engines(count: int, at_once: int) -> EngineOptions:
        return EngineOptions(count, max_sequences=at_once, threads=1, kv_cache_mib=64)

    request = Request(
        "tiny-arithmetic",
        "tiny",
        out=out,
        definitions=definitions,
        engines=engines(1, AT_ONCE),
        workers=1,
    )
    resumed = evaluate(request, Console(quiet=True))
    assert resumed.results is not None
    # What was there is there still, in its place; only the rest was generated.
    assert samples.read_bytes().startswith(kept)
    assert resumed.times.samples <= ITEMS * SAMPLES - kept.count(b"\n")

    request = Request(
        "tiny-arithmetic",
        "tiny",
        out=whole,
        definitions=definitions,
        engines=engines(2, 7),
        workers=1,
    )
    undisturbed = evaluate(request, Console(quiet=True))
    assert rows(out) == rows(whole)
    assert resumed.results == undisturbed.results
    assert len(rows(out)) == ITEMS * SAMPLES
    texts = {row["response"] for row in rows(out)}
    assert len(texts) > ITEMS
    assert all("<|im_start|>user" in row["prompt"] for row in rows(out))

    before = (out / "samples.jsonl").read_bytes()
    results, changed = regrade(out, definitions=definitions, workers=1)
    assert (results, changed) == (resumed.results, 0)
    assert (out / "samples.jsonl").read_bytes() == before
