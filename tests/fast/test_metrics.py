"""The run's diary: what is written survives a kill at any byte, and a full disk costs rows only."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prorl_nemo.training.metrics import (
    PROCESS_EVENTS,
    RunFileError,
    RunLog,
    plain,
    read_rows,
    sample_steps,
    samples_path,
)


def train_row(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "time": 1.0, **values}


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run") as log:
        log.metrics(train_row(1, **{"policy/kl": 0.1, "policy/loss": -2.5e-7}))
        log.event("reference_reset", 1, time=2.0, trigger="interval", figures={"kl": 0.1})
        log.samples(1, [{"response": "½ \ud800 </script>", "tokens": 3}])
        assert log.lost_rows == 0
    run_dir = tmp_path / "run"
    assert read_rows(run_dir / "metrics.jsonl") == [
        {"kind": "train", "step": 1, "time": 1.0, "policy/kl": 0.1, "policy/loss": -2.5e-7}
    ]
    assert read_rows(run_dir / "events.jsonl") == [
        {
            "time": 2.0,
            "step": 1,
            "event": "reference_reset",
            "trigger": "interval",
            "figures": {"kl": 0.1},
        }
    ]
    assert read_rows(run_dir / "samples" / "step_000001.jsonl") == [
        {"response": "½ \ud800 </script>", "tokens": 3}
    ]
    assert read_rows(run_dir / "absent.jsonl") == []


def test_time_is_filled_in_and_each_row_is_on_disk_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    written = log.metrics({"kind": "validation", "step": 0, "validation/mean": 0.5})
    assert written["time"] > 1.7e9  # seconds since 1970, after 2023
    assert read_rows(tmp_path / "metrics.jsonl") == [written]
    log.close()


def test_values_that_json_lacks(tmp_path: Path) -> None:
    values = {
        "a": math.nan,
        "b": [math.inf, 1.0],
        "c": np.float32(0.5),
        "d": np.int64(3),
        "e": np.array(math.nan),
        "f": Path("x/y"),
        "g": (True, None),
        7: "key",
    }
    assert plain(values) == {
        "a": None,
        "b": [None, 1.0],
        "c": 0.5,
        "d": 3,
        "e": None,
        "f": "x/y",
        "g": [True, None],
        "7": "key",
    }
    with RunLog(tmp_path) as log:
        log.metrics(train_row(1, **{"policy/grad_norm": math.inf}))
    assert read_rows(tmp_path / "metrics.jsonl")[0]["policy/grad_norm"] is None
    with pytest.raises(TypeError, match="set"):
        plain({"x": {1, 2}})


@pytest.mark.parametrize(
    "row",
    [{"step": 1}, {"kind": "train"}, {"kind": "other", "step": 1}, {"kind": "train", "step": None}],
)
def test_a_row_without_kind_and_step_is_a_bug(tmp_path: Path, row: dict[str, Any]) -> None:
    with RunLog(tmp_path) as log, pytest.raises(ValueError, match="kind and step"):
        log.metrics(row)


ROWS = [train_row(step, value=step / 7, text="½ \n \\") for step in range(1, 6)]


@settings(deadline=None)
@given(cut=st.integers(0, 10_000), debris=st.sampled_from([b"", b"\0\0\0", b"{", b"\xff\xfe\n"]))
def test_a_kill_at_any_byte_costs_the_unfinished_row_alone(cut: int, debris: bytes) -> None:
    """Against a reference that counts whole lines of the cut file by hand."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        with RunLog(Path(folder)) as log:
            for row in ROWS:
                log.metrics(row)
        data = path.read_bytes()
        cut %= len(data) + 1
        path.write_bytes(data[:cut] + debris)
        ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
        survivors = sum(end <= cut for end in ends)
        # A row that lacks only its newline is whole, unless debris stands in its place.
        if not debris and cut + 1 in ends:
            survivors += 1
        assert read_rows(path) == ROWS[:survivors]
        with RunLog(Path(folder)) as log:
            log.metrics(train_row(99))
        assert read_rows(path) == [*ROWS[:survivors], train_row(99)]


def test_damage_before_the_last_line_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"st\n\n{"step":3}\n')
    with pytest.raises(RunFileError, match=r"metrics\.jsonl, line 2:"):
        read_rows(path)


@pytest.mark.parametrize("line", [b"[1,2]", b"3", b'"text"', b"[" * 100_000, b"9" * 5000])
def test_a_line_that_is_no_object_is_damage(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n' + line + b"\n")
    assert read_rows(path) == [{"step": 1}]
    path.write_bytes(line + b'\n{"step":1}\n')
    with pytest.raises(RunFileError, match="line 1"):
        read_rows(path)


def test_resume_forgets_what_is_later_than_the_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.event("run_started", 0)
    for step in range(1, 8):
        log.metrics(train_row(step))
        log.metrics({"kind": "validation", "step": step, "time": 1.0})
        log.samples(step, [{"response": str(step)}])
        log.event("checkpoint_saved", step)
    log.event("engine_restarted", 7)
    assert log.truncate_after(4) == 6
    log.metrics(train_row(5, again=True))
    log.event("resumed", 4)
    log.close()

    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["kind"], row["step"]) for row in rows] == [
        *((kind, step) for step in range(1, 5) for kind in ("train", "validation")),
        ("train", 5),
    ]
    assert rows[-1]["again"] is True
    assert sample_steps(tmp_path) == [1, 2, 3, 4]
    events = [(row["event"], row["step"]) for row in read_rows(tmp_path / "events.jsonl")]
    assert events == [
        ("run_started", 0),
        *(("checkpoint_saved", step) for step in range(1, 5)),
        ("engine_restarted", 7),
        ("resumed", 4),
    ]
    assert {"run_started", "resumed", "engine_restarted"} <= PROCESS_EVENTS
    assert not list(tmp_path.rglob("*.part"))


def test_truncating_at_the_end_changes_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.metrics(train_row(1))
        before = (tmp_path / "metrics.jsonl").read_bytes()
        assert log.truncate_after(1) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_samples_of_a_step_done_again_replace_the_old_ones(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.samples(12, [{"response": "old"}, {"response": "old"}])
        log.samples(12, [{"response": "new"}])
    assert read_rows(samples_path(tmp_path, 12)) == [{"response": "new"}]
    (tmp_path / "samples" / "step_notes.txt").touch()
    assert sample_steps(tmp_path) == [12]


FULL_DISK = """
import json, logging, resource, sys
from pathlib import Path
from prorl_nemo.training.metrics import RunLog, read_rows

logging.basicConfig(format="%(message)s")
run_dir = Path(sys.argv[1])
log = RunLog(run_dir)
row = {"kind": "train", "step": 0, "time": 1.0, "filler": "x" * 300}
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
# No file may grow beyond 1,000 bytes: the third row is cut short by the kernel.
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
for step in range(1, 6):
    log.metrics({**row, "step": step})
log.samples(3, [{"response": "y" * 2000}, {"response": ""}])
during = log.lost_rows
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.metrics({**row, "step": 9})
log.samples(9, [{"response": "z"}])
steps = [r["step"] for r in read_rows(run_dir / "metrics.jsonl")]
print(json.dumps([during, log.lost_rows, steps, sorted(p.name for p in run_dir.rglob("*"))]))
"""


def test_a_full_disk_costs_rows_not_the_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    during, after, steps, names = json.loads(done.stdout)
    # Rows of about 360 bytes: two fit, three are lost, and so are both samples of step 3.
    assert during == after == 5
    assert steps == [1, 2, 9]
    assert names == ["events.jsonl", "metrics.jsonl", "samples", "step_000009.jsonl"]
    assert done.stderr.count("a row is lost") == 1
