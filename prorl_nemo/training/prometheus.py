"""The newest figures for Prometheus, on a free port that the run's folder tells.

`prometheus.json` in the run's folder is a target file of Prometheus's file service discovery
(file_sd_configs), so nothing has to be configured for a run, and two runs on a node do not meet.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path

from prorl_nemo.recipe import Recipe

TARGETS = "prometheus.json"
_OTHER = re.compile(r"[^a-zA-Z0-9]+")


def metric_name(key: str) -> str:
    """`rollout/kept/chain_sum` -> `prorl_rollout_kept_chain_sum`."""
    return "prorl_" + _OTHER.sub("_", key.replace("+", "_plus")).strip("_")


def open_prometheus(
    recipe: Recipe, run_dir: Path
) -> tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]:
    """Start to serve; returns what writes a row and what ends it."""
    from prometheus_client import CollectorRegistry, Gauge, start_http_server

    registry = CollectorRegistry()
    server, thread = start_http_server(0, registry=registry)
    target = f"{socket.getfqdn()}:{server.server_port}"
    aside = run_dir / f"{TARGETS}.part"
    aside.write_text(json.dumps([{"targets": [target], "labels": {"run": recipe.name}}]) + "\n")
    aside.replace(run_dir / TARGETS)
    gauges: dict[str, Gauge] = {}

    def write(step: int, figures: dict[str, float]) -> None:
        for key, value in {"step": float(step), **figures}.items():
            name = metric_name(key)
            if name not in gauges:
                gauges[name] = Gauge(name, key, registry=registry)
            gauges[name].set(value)

    def close() -> None:
        (run_dir / TARGETS).unlink(missing_ok=True)
        server.shutdown()
        server.server_close()
        thread.join()

    return write, close
