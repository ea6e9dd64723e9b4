"""The live view: right figures, plain lines without a terminal, and nothing makes it fail."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from prorl_nemo.training.live_panel import FIGURES, STOP_HINT
from prorl_nemo.training.live_text import DASH, describe_event, duration, sparkline
from prorl_nemo.training.live_view import LiveView

ROW = {
    "kind": "train",
    "step": 12,
    "time": 1000.0,
    "stage": 0,
    "stage_name": "short answers",
    "reward/raw_mean": 0.4123,
    "reward/shaped_mean": 0.398,
    "rollout/kept_share": 0.63,
    "rollout/response_tokens_mean": 312.4,
    "rollout/response_limit": 1024,
    "rollout/truncated_share": 0.041,
    "policy/kl": 0.00123,
    "policy/entropy": 1.31,
    "policy/grad_norm": 0.42,
    "mismatch/mean_abs": 0.0123,
    "time/generate": 9.2,
    "time/step": 14.2,
    "throughput/generated_tokens_per_second": 812.3,
}


def plain_view(total: int = 300) -> tuple[LiveView, io.StringIO]:
    out = io.StringIO()
    return LiveView("quickstart", "smollm2", total, Console(file=out)), out


def drawn(view: LiveView, width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(view._render())
    return console.export_text()


def terminal_view(total: int = 300) -> LiveView:
    console = Console(file=io.StringIO(), force_terminal=True)
    return LiveView("quickstart", "smollm2", total, console)


def test_one_line_per_step_validation_and_event() -> None:
    view, out = plain_view()
    with view:
        view.phase("generate", total=64)
        view.progress(23, "812 tok/s")
        view.step(ROW)
        view.validation({"step": 10, "validation/mean": 0.21, "validation/stderr": 0.02})
        view.event({"time": 1.0, "step": 10, "event": "reference_reset", "trigger": "interval"})
    assert out.getvalue().splitlines() == [
        "[12/300]  reward 0.412  shaped 0.398  kept 63%  tokens 312/1024  truncated 4%  kl 0.0012"
        "  entropy 1.31  grad 0.42  mismatch 0.01  812 tok/s  14.2 s  left 1 h 08 m",
        "[10/300] validation 0.210 ± 0.020",
        "[10/300] reference reset: trigger interval",
    ]


def test_the_panel_shows_step_phase_figures_curves_events_and_how_to_stop() -> None:
    view = terminal_view()
    view.step(ROW)
    view.validation({"step": 0, "validation/mean": 0.1, "validation/stderr": 0.02})
    view.validation({"step": 10, "validation/mean": 0.21, "validation/stderr": 0.02})
    view.event({"time": 1.0, "step": 10, "event": "checkpoint_saved", "seconds": 3.14159})
    view.phase("generate", total=64)
    view.progress(23, "812 tok/s, 3 rejected")
    text = drawn(view)
    for wanted in [
        "quickstart",
        "smollm2",
        "step 12 of 300",
        "stage 1 short answers",
        "left 1 h 08 m",
        "generate",
        "23/64",
        "812 tok/s, 3 rejected",
        "generate 9.2 s at 812 tok/s",
        "0.100 → 0.210 ± 0.020, best 0.210 at step 10",
        "checkpoint saved: seconds 3.142",
        STOP_HINT,
        *FIGURES,
    ]:
        assert wanted in text, wanted


def test_a_terminal_gets_the_live_panel_and_no_lines() -> None:
    out = io.StringIO()
    view = LiveView("q", "m", 3, Console(file=out, force_terminal=True, width=100, height=40))
    with view:
        view.step(ROW)
    assert "step 12 of 3" in out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert "[12/3]" not in out.getvalue()


def test_time_left_is_recent_wall_clock_time_per_step() -> None:
    view, out = plain_view(total=10)
    # Steps 1 to 3 end at 100 s, 110 s and 130 s: 15 s a step, seven to go.
    for step, ended in [(1, 100.0), (2, 110.0), (3, 130.0)]:
        view.step({"step": step, "time": ended, "time/step": 5.0})
    assert out.getvalue().splitlines()[-1].endswith("left 1 m 45 s")


def test_the_pause_of_a_restart_is_not_the_time_of_a_step() -> None:
    view, out = plain_view(total=10)
    view.history(
        [
            {"kind": "train", "step": 1, "time": 100.0, "time/step": 8.0},
            {"kind": "validation", "step": 1, "validation/mean": 0.3},
        ],
        step=1,
    )
    view.step({"step": 2, "time": 90_000.0, "time/step": 10.0})
    # Nothing but the steps' own 8 s and 10 s is known: 9 s times eight.
    assert out.getvalue().splitlines() == [out.getvalue().strip()]
    assert out.getvalue().strip().endswith("left 1 m 12 s")
    assert "0.300 → 0.300" in drawn(view)


def test_a_restart_shows_no_step_twice() -> None:
    view = terminal_view()
    for step, reward in ((1, 0.1), (2, 0.2), (3, 0.9)):
        view.step({"step": step, "reward/raw_mean": reward})
    view.validation({"step": 3, "validation/mean": 0.77})
    # Restarted in this process, from the checkpoint of step 2.
    view.history([{"step": 1, "reward/raw_mean": 0.1}, {"step": 2, "reward/raw_mean": 0.2}], step=2)
    shown = drawn(view)
    assert "step 2 of 300" in shown
    assert f"{sparkline([0.1, 0.2], 32)}  0.100 → 0.200" in shown
    assert "0.77" not in shown
    view.history([], step=0)
    assert "step 0 of 300" in drawn(view)


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
KEYS = st.sampled_from(
    [
        "step",
        "time",
        "event",
        "stage",
        "stage_name",
        "kind",
        "time/step",
        "time/generate",
        "validation/mean",
        "validation/stderr",
        "figures",
        *(key for figures in FIGURES.values() for _, key, _ in figures),
    ]
)


@settings(max_examples=60, deadline=None)
@given(row=st.dictionaries(KEYS, VALUES), number=st.floats(), text=st.text(max_size=30))
@pytest.mark.parametrize("terminal", [True, False])
def test_no_row_makes_it_fail(
    terminal: bool, row: dict[str, Any], number: float, text: str
) -> None:
    view = terminal_view() if terminal else plain_view()[0]
    for call in (view.step, view.validation, view.event):
        call({})
        call(row)
    view.history([{}, row, {"kind": "validation", **row}], step=3)
    view.phase(text, total=number)
    view.progress(number, text)
    drawn(view, width=50)


def test_what_is_missing_is_a_dash() -> None:
    view, out = plain_view()
    view.step({"policy/kl": None, "reward/raw_mean": math.nan, "policy/entropy": True})
    assert out.getvalue().startswith(f"[1/300]  reward {DASH}  shaped {DASH}")
    assert out.getvalue().strip().endswith(f"left {DASH}")


def test_control_characters_do_not_reach_the_terminal() -> None:
    view, out = plain_view()
    hostile = "\x1b[2J\x1b]0;title\x07 [bold]x[/bold]\n"
    view.event({"event": "prompt_dropped", "step": 1, "prompt_id": hostile})
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().count("\n") == 1
    assert "\x1b" not in drawn(view)
    assert "[bold]x[/bold]" in drawn(view)


def test_a_closed_stream_does_not_end_the_run() -> None:
    view, out = plain_view()
    out.close()
    view.step(ROW)
    view.event({"event": "finished"})


def test_a_stream_that_knows_ascii_only_gets_lines_it_can_hold() -> None:
    raw = io.BytesIO()
    ascii_only = io.TextIOWrapper(raw, encoding="ascii")
    view = LiveView("q", "m", 3, Console(file=ascii_only, force_terminal=True))
    with view:
        view.validation({"step": 1, "validation/mean": 0.5, "validation/stderr": 0.1})
    assert raw.getvalue() == b"[1/3] validation 0.500 ? 0.100\n"


def test_events_in_words() -> None:
    event = {
        "time": 1.0,
        "step": 3,
        "event": "reset_decision",
        "reset": False,
        "figures": {"kl": 0.012345678, "mean": 0.5},
    }
    assert describe_event(event) == "reset decision: reset False, figures kl=0.01235 mean=0.5"
    causes = describe_event({"event": "mismatch_warning", "causes": ["a stale head", "rope"]})
    assert causes == "mismatch warning: causes a stale head; rope"
    assert describe_event({}) == "event"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, DASH),
        (math.inf, DASH),
        (-3, "0 s"),
        (8.4, "8 s"),
        (59.6, "1 m 00 s"),
        (751, "12 m 31 s"),
        (11_520, "3 h 12 m"),
        (190_800, "2 d 05 h"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_sparkline_by_hand() -> None:
    assert sparkline([0, 7, 3.5], 10) == "▁█▅"  # 3.5 is half way: level round(3.5) = 4
    assert sparkline([1, 1], 10) == "▄▄"
    assert sparkline([0, 2, 8, 10], 2) == "▁█"  # means 1 and 9
    assert sparkline([], 10) == ""


@settings(deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), width=st.integers(1, 40))
def test_sparkline_against_a_slow_reference(values: list[float], width: int) -> None:
    count = min(width, len(values))
    cells: list[list[float]] = [[] for _ in range(count)]
    bounds = [round(i * len(values) / count) for i in range(count + 1)]
    for i, value in enumerate(values):
        cells[max(cell for cell in range(count) if bounds[cell] <= i)].append(value)
    means = [sum(cell) / len(cell) for cell in cells]
    line = sparkline(values, width)
    assert len(line) == count
    if max(means) > min(means):
        assert line[means.index(max(means))] == "█"
        assert line[means.index(min(means))] == "▁"
    order = sorted(range(count), key=lambda i: means[i])
    assert all(line[a] <= line[b] for a, b in pairwise(order))


IN_A_PROCESS = """
from pathlib import Path
from prorl_nemo.training.live_view import LiveView
LiveView("two words", "model", 10).phase("generate")
print(Path("/proc/self/stat").read_text())
print(Path("/proc/self/cmdline").read_text().rstrip(chr(0)))
"""


def test_what_ps_shows_is_read_by_slurm() -> None:
    """proctrack/linuxproc reads a line of /proc word by word: a short name of two words hides a
    process from its signals."""
    command = [sys.executable, "-c", IN_A_PROCESS]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown[0].split()[1:3] == ["(prorl)", "R"]
    assert shown[-1] == "prorl two words: step 1, generate"
