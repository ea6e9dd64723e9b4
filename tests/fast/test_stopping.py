"""When a run has to stop: signals, the clock, and what is left of both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from prorl_nemo.training import stopping
from prorl_nemo.training.stopping import OutOfTime, StopWatch, seconds_left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_reason(number: signal.Signals) -> None:
    watch = StopWatch(stop_seconds=60)
    with watch.listening():
        assert watch.should_stop(0) is None
        os.kill(os.getpid(), number)
        assert watch.should_stop(0) == number.name
        if number != signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)  # Slurm repeats itself; the first one counts.
        assert watch.should_stop(0) == number.name


def test_handlers_and_timer_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
    watch = StopWatch(stop_seconds=60)
    with watch.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_second_ctrl_c_ends_at_once() -> None:
    watch = StopWatch(stop_seconds=60)
    with watch.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_out_of_time_is_raised_before_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    # A tenth is left by default; here most of it, for machines that are busy.
    monkeypatch.setattr(stopping, "LAST_MOMENTS", 0.9)
    watch = StopWatch(stop_seconds=5.0)
    started = time.monotonic()
    with watch.listening(), pytest.raises(OutOfTime):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    assert 0.4 < time.monotonic() - started < 5.0
    assert not issubclass(OutOfTime, Exception)  # `except Exception` must not swallow it.


def test_a_process_that_does_not_end_is_ended() -> None:
    """Stuck in a call that neither returns nor lets Python take a signal: a lock taken twice."""
    program = (
        "import ctypes, os, signal\n"
        "from prorl_nemo.training.stopping import StopWatch\n"
        "with StopWatch(1.0).listening():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    mutex = ctypes.create_string_buffer(64)\n"
        "    for _ in range(2):\n"
        "        ctypes.CDLL(None).pthread_mutex_lock(mutex)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert run.returncode == 3
    assert "ended 1 s after SIGTERM" in run.stderr


def test_wall_clock_leaves_time_for_a_save() -> None:
    watch = StopWatch(stop_seconds=60, seconds_left=100.0)
    assert watch.should_stop(50.0) is None
    assert "wall clock" in str(watch.should_stop(101.0))
    assert "wall clock" in str(watch.should_stop(0.0))  # Once it is late it stays so.
    assert StopWatch(60).should_stop(1e9) is None


def test_time_left_is_the_recipes_or_slurms() -> None:
    assert seconds_left(2.0, {"SLURM_JOB_END_TIME": "1"}) == 7200.0
    end = str(int(time.time()) + 500)
    # Whole seconds, and those that pass meanwhile.
    assert seconds_left(None, {"SLURM_JOB_END_TIME": end}) == pytest.approx(500, abs=2)
    assert seconds_left(None, {"SLURM_JOB_END_TIME": "Unknown"}) is None
    assert seconds_left(None, {}) is None


def test_a_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = StopWatch(stop_seconds=60, seconds_left=100.0)
    for jump in (-1e9, 1e9):
        monkeypatch.setattr(stopping.time, "time", lambda jump=jump: jump)
        assert watch.should_stop(10.0) is None


def test_what_follows_a_save_is_given_what_is_left() -> None:
    watch = StopWatch(stop_seconds=60)
    with watch.listening():
        assert watch.left(20.0) == 20.0
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.left(20.0) == 20.0
        assert 40 < watch.left(100.0) < 48  # The last moments are for ending the processes.
