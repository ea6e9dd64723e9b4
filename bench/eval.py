"""Where the time of an evaluation goes: generation and grading, or the harness around them.

SmolLM2-135M-Instruct on HumanEval, whose items come with a package, through the command's own
path. The goal: harness time, that is everything but the start of engines and graders, generation
and grading, is below 5 % of the whole. While engines and graders are busy, what this process does
itself counts as harness too, though they do not wait for it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prorl_nemo.evaluation.suite import Changes
from prorl_nemo.harness.evaluate import Request, evaluate
from prorl_nemo.harness.fleet_generator import EngineOptions

ITEMS, SAMPLES, TOKENS = 32, 4, 128
STARTING = ("engines", "graders")
GOAL = 0.05


def main(json_path: Path | None) -> None:
    """Run the bench, print its table and write the figures to `json_path`."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        request = Request(
            "smollm2-135m-instruct",
            "quick",
            ["humaneval"],
            out=Path(folder) / "out",
            changes=Changes(samples=SAMPLES, items=ITEMS, max_tokens=TOKENS),
            engines=EngineOptions(max_sequences=64),
        )
        began = time.perf_counter()
        times = evaluate(request, console).times
        whole = time.perf_counter() - began
        size = sum(path.stat().st_size for path in (Path(folder) / "out").iterdir())
    starting = sum(times.stages[name] for name in STARTING)
    around = {name: s for name, s in times.stages.items() if name not in STARTING}
    harness = sum(around.values()) + times.own
    figures: dict[str, Any] = {
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "items": ITEMS,
        "samples": times.samples,
        "tokens": times.tokens,
        "bytes_written": size,
        "seconds": whole,
        "seconds_starting": starting,
        "seconds_generating_and_grading": times.busy,
        "tokens_per_second": times.tokens / times.busy,
        "harness_seconds": {**around, "beside the engines": times.own},
        "harness_share": harness / whole,
        "harness_share_without_the_start": harness / (whole - starting),
        "goal": GOAL,
    }
    table = Table("what", "seconds", title="One evaluation")
    for name, seconds in (
        ("whole", whole),
        ("start of engines and graders", starting),
        ("generation and grading", times.busy),
        *((f"harness: {name}", s) for name, s in figures["harness_seconds"].items()),
    ):
        table.add_row(name, f"{seconds:.2f}")
    console.print(table)
    console.print(
        f"harness: {figures['harness_share']:.1%} of the whole, "
        f"{figures['harness_share_without_the_start']:.1%} without the start; goal {GOAL:.0%}"
    )
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(figures, indent=1) + "\n")
