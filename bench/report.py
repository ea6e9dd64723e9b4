"""How long `prorl report` takes for one and for two runs of 3,000 steps with several restarts.

The runs are imagined (bench/long_run.py), the command is the real one, the interpreter's start
included. How soon a browser shows the page depends mostly on its size, which is given too.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.long_run import write_run

STEPS = 3000
REPEATS = 5


def main(json_path: Path | None) -> None:
    """Run the bench, print its table and write the figures to `json_path`."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            write_run(Path(folder) / "one", seed=1, steps=STEPS, crashes=(470, 1320, 2230, 2700)),
            write_run(Path(folder) / "two", seed=2, steps=STEPS, crashes=(900,)),
        ]
        rows = [_measure(runs[:count], Path(folder) / "report.html") for count in (1, 2)]
    table = Table(title=f"prorl report of runs of {STEPS:,} steps")
    for column in ("runs", "seconds", "page, MB"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["runs"]), f"{row['seconds']:.2f}", f"{row['bytes'] / 1e6:.2f}")
    Console().print(table)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"steps": STEPS, "pages": rows}, indent=1) + "\n")


def _measure(runs: list[Path], out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "prorl_nemo.cli", "report", *map(str, runs)]
    seconds = []
    for _ in range(REPEATS):
        started = time.monotonic()
        subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.monotonic() - started)
    return {
        "runs": len(runs),
        "seconds": statistics.median(seconds),
        "bytes": out.stat().st_size,
    }
