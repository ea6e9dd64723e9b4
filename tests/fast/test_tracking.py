"""Tracking back ends: rows arrive in order, and one that is down costs rows and nothing else."""

from __future__ import annotations

import importlib.util
import json
import logging
import threading
import time
import urllib.request
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
    never = threading.Event()
    tracker = Tracker(
        [("hanging", lambda: (lambda step, figures: never.wait() and None, never.set))]
    )
    started = time.monotonic()
    for step in range(100):
        tracker.log({"kind": "train", "step": step, "a": 1.0})
    assert time.monotonic() - started < 0.5
    lost = tracker.close(0.2)["hanging"]
    never.set()
    # All but the one that hangs and, perhaps, one that was taken before the queue filled.
    assert lost >= 98


def test_back_ends_that_hang_share_the_time_to_close() -> None:
    never = threading.Event()
    hanging: Open = lambda: never.wait() and None  # type: ignore[assignment, return-value]  # noqa: E731
    tracker = Tracker([(f"hanging {number}", hanging) for number in range(4)])
    tracker.log({"kind": "train", "step": 1, "a": 1.0})
    started = time.monotonic()
    assert tracker.close(0.5) == {f"hanging {number}": 1 for number in range(4)}
    assert 0.4 < time.monotonic() - started < 1.5
    never.set()


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


def test_prometheus_serves_the_newest_figures(tmp_path: Path) -> None:
    tracker = Tracker.of_recipe(recipe(["prometheus"]), tmp_path)
    targets = tmp_path / "prometheus.json"
    tracker.log({"kind": "train", "step": 1, "reward/raw_mean": 0.1})
    tracker.log({"kind": "train", "step": 2, "reward/raw_mean": 0.25, "rollout/8192+": 1.0})
    text, deadline = "", time.monotonic() + 10
    while "prorl_step 2.0" not in text and time.monotonic() < deadline:
        time.sleep(0.05)
        if targets.exists():
            (entry,) = json.loads(targets.read_text())
            port = entry["targets"][0].rpartition(":")[2]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
    assert entry["labels"] == {"run": "small"}
    assert "prorl_reward_raw_mean 0.25" in text and "prorl_rollout_8192_plus 1.0" in text
    assert tracker.close() == {"prometheus": 0}
    assert not targets.exists()


def test_no_back_end_asks_for_nothing(tmp_path: Path) -> None:
    check_installed(recipe([]))
    tracker = Tracker.of_recipe(recipe([]), tmp_path)
    tracker.log({"kind": "train", "step": 1, "a": 1.0})
    assert tracker.close() == {}
    assert list(tmp_path.iterdir()) == []
