"""Tracking back ends: rows arrive in order, and one that is down costs rows and nothing else."""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prorl_nemo.errors import RecipeError
from prorl_nemo.recipe import Recipe, parse_recipe
from prorl_nemo.training import tracking
from prorl_nemo.training.tracking import Open, Tracker, check_installed

Rows = list[tuple[int, dict[str, float]]]


def into(rows: Rows, closed: threading.Event) -> Open:
    return lambda: (lambda step, figures: rows.append((step, figures)), closed.set)


def test_figures_arrive_in_order_without_texts_and_times() -> None:
    rows: Rows = []
    closed = threading.Event()
    tracker = Tracker([("memory", into(rows, closed))])
    for step in range(1, 501):
        tracker.log(
            {"kind": "train", "step": step, "time": 1e9, "a/b": step / 2, "n": 3, "gone": None}
        )
    assert tracker.close() == {"memory": 0}
    assert closed.is_set()
    assert rows == [(step, {"a/b": step / 2, "n": 3.0}) for step in range(1, 501)]


def raises(message: str) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise ConnectionError(message)

    return fail


def test_a_back_end_that_is_down_never_stops_training(caplog: pytest.LogCaptureFixture) -> None:
    rows: Rows = []
    tracker = Tracker(
        [
            ("unreachable", raises("no route to host")),  # type: ignore[list-item]
            ("failing", lambda: (raises("502"), lambda: None)),
            ("working", into(rows, threading.Event())),
        ]
    )
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            tracker.log({"kind": "train", "step": step, "a": 1.0})
        assert tracker.close() == {"unreachable": 3, "failing": 3, "working": 0}
    assert [step for step, _ in rows] == [1, 2, 3]
    messages = " ".join(record.message for record in caplog.records)
    assert "unreachable lacks figures from here on" in messages
    assert messages.count("failing lacks") == 1  # Said once, not at every step.


def test_a_back_end_that_hangs_loses_rows_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "QUEUED_ROWS", 5)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.2)
    never = threading.Event()
    tracker = Tracker(
        [("hanging", lambda: (lambda step, figures: never.wait() and None, never.set))]
    )
    started = time.monotonic()
    for step in range(100):
        tracker.log({"kind": "train", "step": step, "a": 1.0})
    assert time.monotonic() - started < 0.5
    lost = tracker.close()["hanging"]
    never.set()
    # All but the one that hangs and, perhaps, one that was taken before the queue filled.
    assert lost >= 98


def recipe(backends: list[str]) -> Recipe:
    return parse_recipe(
        {
            "name": "small",
            "model": "somewhere",
            "data": {"sources": [{"task": "coin_flip"}]},
            "tracking": {"backends": backends},
            "stages": [{"steps": 6}],
        }
    )


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_back_end_without_its_package_is_refused_by_name(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        with pytest.raises(RecipeError, match=f"tracking.backends: {name} is not installed"):
            check_installed(recipe([name]))
    else:
        check_installed(recipe([name]))


def test_no_back_end_asks_for_nothing(tmp_path: Path) -> None:
    check_installed(recipe([]))
    tracker = Tracker.of_recipe(recipe([]), tmp_path)
    tracker.log({"kind": "train", "step": 1, "a": 1.0})
    assert tracker.close() == {}
    assert list(tmp_path.iterdir()) == []
