"""Figures to TensorBoard, Weights & Biases, MLflow and Prometheus, as the recipe asks.

metrics.jsonl is always written and is the record; these are copies of it.

A back end works on a thread of its own behind a bounded queue. If it is down, slow or raises,
rows for it are lost and counted, and training does not notice.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prorl_nemo.errors import RecipeError
from prorl_nemo.recipe import Recipe
from prorl_nemo.training.prometheus import open_prometheus

logger = logging.getLogger(__name__)

QUEUED_ROWS = 1000
CLOSE_SECONDS = 20.0
_PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "prometheus": "prometheus_client",
}

Row = Mapping[str, Any]
Write = Callable[[int, dict[str, float]], None]
"""Takes a step and its figures."""
Open = Callable[[], tuple[Write, Callable[[], None]]]
"""Connects; returns what writes a row and what closes the back end."""


def check_installed(recipe: Recipe) -> None:
    """Raises RecipeError for a back end whose package is not there."""
    for name in recipe.tracking.backends:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise RecipeError(
                f"tracking.backends: {name} is not installed; install it (pip install "
                f"{_PACKAGES[name]}) or remove it from the list"
            )


class Tracker:
    """Sends rows to back ends.

    Args:
        backends: (name, how to open it) of each.
    """

    def __init__(self, backends: Sequence[tuple[str, Open]]) -> None:
        self._senders = [_Sender(name, open_backend) for name, open_backend in backends]

    @classmethod
    def of_recipe(cls, recipe: Recipe, run_dir: Path) -> Tracker:
        """The back ends of a recipe; call `check_installed` before."""
        openers: dict[str, Callable[[Recipe, Path], tuple[Write, Callable[[], None]]]] = {
            "tensorboard": _open_tensorboard,
            "wandb": _open_wandb,
            "mlflow": _open_mlflow,
            "prometheus": open_prometheus,
        }
        return cls(
            [
                (name, lambda opener=openers[name]: opener(recipe, run_dir))  # type: ignore[misc]
                for name in recipe.tracking.backends
            ]
        )

    def log(self, row: Row) -> None:
        """Queue a metrics row; returns at once."""
        figures = {
            key: float(value)
            for key, value in row.items()
            if isinstance(value, int | float) and key not in ("step", "time")
        }
        for sender in self._senders:
            sender.put(int(row["step"]), figures)

    def close(self, seconds: float = CLOSE_SECONDS) -> dict[str, int]:
        """Send what is queued, for so many seconds at most; rows lost by each back end."""
        for sender in self._senders:
            sender.end()
        until = time.monotonic() + seconds
        return {sender.name: sender.close(until) for sender in self._senders}


class _Sender:
    def __init__(self, name: str, open_backend: Open) -> None:
        self.name, self._open = name, open_backend
        self._rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(QUEUED_ROWS)
        self._lost = 0
        self._ended = threading.Event()
        # A daemon: a back end that never answers must not keep the process.
        self._thread = threading.Thread(target=self._run, name=f"tracking {name}", daemon=True)
        self._thread.start()

    def put(self, step: int, figures: dict[str, float]) -> None:
        try:
            self._rows.put_nowait((step, figures))
        except queue.Full:
            self._lose("its queue is full")

    def end(self) -> None:
        """No more rows will come."""
        self._ended.set()
        with suppress(queue.Full):  # Its thread then sees the end after a row.
            self._rows.put_nowait(None)

    def close(self, until: float) -> int:
        """Wait for the thread, up to a time of the monotonic clock; rows lost."""
        self._thread.join(max(0.0, until - time.monotonic()))
        left = [item for item in tuple(self._rows.queue) if item is not None]
        return self._lost + len(left)

    def _next(self) -> tuple[int, dict[str, float]] | None:
        if self._ended.is_set() and self._rows.empty():
            return None
        return self._rows.get()

    def _run(self) -> None:
        try:
            write, close = self._open()
        except Exception as error:
            self._lose(f"it cannot be opened ({error})", rows=0)
            while self._next() is not None:
                self._lost += 1
            return
        while (item := self._next()) is not None:
            try:
                write(*item)
            except Exception as error:
                self._lose(str(error))
        try:
            close()
        except Exception as error:
            self._lose(f"it cannot be closed ({error})", rows=0)

    def _lose(self, why: str, rows: int = 1) -> None:
        if not self._lost:
            logger.warning("tracking: %s lacks figures from here on: %s", self.name, why)
        self._lost += rows


def _open_tensorboard(recipe: Recipe, run_dir: Path) -> tuple[Write, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"))  # type: ignore[no-untyped-call]

    def write(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
        writer.flush()  # type: ignore[no-untyped-call]

    return write, writer.close


def _open_wandb(recipe: Recipe, run_dir: Path) -> tuple[Write, Callable[[], None]]:
    import wandb

    run = wandb.init(
        project=recipe.tracking.project,
        name=recipe.name,
        # A resumed run goes on in its own page.
        id=f"{recipe.name}-{recipe.fingerprint}",
        resume="allow",
        dir=str(run_dir),
        mode="offline" if recipe.tracking.offline else "online",
        config=recipe.model_dump(mode="json"),
        # The terminal is the live view's.
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.define_metric("rollout_step")
    run.define_metric("*", step_metric="rollout_step")

    def write(step: int, figures: dict[str, float]) -> None:
        run.log({"rollout_step": step, **figures})

    return write, run.finish


def _open_mlflow(recipe: Recipe, run_dir: Path) -> tuple[Write, Callable[[], None]]:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    where = f"sqlite:///{(run_dir / 'mlflow.db').resolve()}" if recipe.tracking.offline else None
    client = MlflowClient(tracking_uri=where)
    experiment = client.get_experiment_by_name(recipe.tracking.project)
    number = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(recipe.tracking.project)
    )
    known = run_dir / "mlflow_run.json"
    if known.exists():
        run_id = json.loads(known.read_text())["run_id"]
    else:
        run_id = client.create_run(number, run_name=recipe.name).info.run_id
        known.write_text(json.dumps({"run_id": run_id}))

    def write(step: int, figures: dict[str, float]) -> None:
        # MLflow's names allow no plus sign ("8192+"), its time is in milliseconds.
        client.log_batch(
            run_id,
            metrics=[
                Metric(name.replace("+", "_plus"), value, 0, step)
                for name, value in figures.items()
            ],
        )

    return write, lambda: client.set_terminated(run_id)
