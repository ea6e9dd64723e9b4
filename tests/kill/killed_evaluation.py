"""A real evaluation that is killed, resumed and graded again: what it kept, and what it shows.

`python tests/kill/killed_evaluation.py --data-dir DIR` evaluates SmolLM2-135M-Instruct on GSM8K,
MATH-500, AIME24, IFEval, HumanEval and Reasoning Gym: subsets and short responses, as two cores
demand. The command is ended with SIGKILL at given numbers of samples and given again. After each
kill every sample that was written must be there still; at the end each is there once, and grading
again changes nothing. Run it again where a time limit ended it: it goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ITEMS, SAMPLES, TOKENS = 12, 2, 96
KILLS = (60, 150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "killed_evaluation")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    # A time limit ends this process: the evaluation, in a session of its own, ends with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(124))
    out = options.folder
    command = [
        sys.executable, "-m", "prorl_nemo.cli", "eval", "smollm2-135m-instruct",
        "--protocol", "quick", "--limit", str(ITEMS), "--samples", str(SAMPLES),
        "--max-tokens", str(TOKENS), "--data-dir", str(options.data_dir), "--out", str(out),
        "--max-sequences", "32", "--workers", "1",
    ]  # fmt: skip
    for number, samples in enumerate(KILLS):
        mark = out / f"killed_{number}"
        if not mark.exists():
            kept = _kill_at(command, out, samples)
            mark.write_text(json.dumps(kept))
    with _running(command) as process:
        assert process.wait() == 0, "the evaluation failed"
    samples_file = out / "samples.jsonl"
    kills = [json.loads((out / f"killed_{n}").read_text()) for n in range(len(KILLS))]
    for kept in kills:
        with samples_file.open("rb") as file:
            same = hashlib.sha256(file.read(kept["bytes"])).hexdigest() == kept["sha256"]
        assert same, "a sample that was written is not there as it was"
    rows = [json.loads(line) for line in samples_file.open()]
    keys = {(row["item"], row["sample"]) for row in rows}
    assert len(keys) == len(rows), "a sample is there twice"
    before = samples_file.read_bytes()
    again = [*command[:4], "--regrade", str(out)]
    said = subprocess.run(again, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "0 verdicts changed" in said, said
    assert samples_file.read_bytes() == before, "grading again changed the file"
    figures = {"samples": len(rows), "kills": kills, "results": _figures(out)}
    print(said)
    print(json.dumps(kills))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _kill_at(command: list[str], out: Path, samples: int) -> dict[str, Any]:
    """End the evaluation with SIGKILL once so many samples are graded; what it had written."""
    path, generated = out / "samples.jsonl", out / "generated.jsonl"
    with _running(command) as process:
        while not path.exists() or path.read_bytes().count(b"\n") < samples:
            assert process.poll() is None, "the evaluation ended before it was killed"
            time.sleep(0.2)
    whole = path.read_bytes()
    end = whole.rfind(b"\n") + 1
    return {
        "graded": whole.count(b"\n"),
        "generated": generated.read_bytes().count(b"\n"),
        "bytes": end,
        "sha256": hashlib.sha256(whole[:end]).hexdigest(),
        "torn": len(whole) - end,
    }


@contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The command, in a session of its own; whatever of it is left at the end is killed."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _figures(out: Path) -> list[dict[str, Any]]:
    document = json.loads((out / "results.json").read_text())
    names = ("name", "metric", "average", "interval", "shares", "extra", "category_mean")
    return [{name: found[name] for name in names} for found in document["benchmarks"]]


if __name__ == "__main__":
    sys.exit(main())
