"""A run's figures and events in words, for lines and panels of a terminal.

Our choice: whatever a row holds is shown, a dash for what it lacks; nothing here raises.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from prorl_nemo.training.metrics import number

Row = Mapping[str, Any]

DASH = "–"  # noqa: RUF001 - the typographic dash stands for a missing figure


def describe_event(event: Row) -> str:
    """An event in one line: its name in words, then its details as `key value`."""
    name = str(event.get("event", "event")).replace("_", " ")
    details = [
        f"{key.replace('_', ' ')} {compact(value)}"
        for key, value in event.items()
        if key not in ("time", "step", "event")
    ]
    return printable(f"{name}: {', '.join(details)}" if details else name)


def duration(seconds: float | None) -> str:
    """`8 s`, `12 m 31 s`, `3 h 12 m`, `2 d 5 h`; a dash for None."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} m"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as at most `width` block characters, each the mean of an equal share of them."""
    count = min(width, len(values))
    if count < 1:
        return ""
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    blocks = "▁▂▃▄▅▆▇█"
    if high == low:
        return blocks[3] * count
    return "".join(blocks[round((mean - low) / (high - low) * 7)] for mean in means)


def stage_of(row: Row) -> str:
    """`stage 2 NAME` of a row that has them."""
    index, name = number(row.get("stage")), row.get("stage_name")
    parts = [f"stage {int(index) + 1}"] if index is not None else []
    return printable(" ".join([*parts, str(name)] if name else parts))


def clock_of(event: Row) -> str:
    """When an event was written, in local time: `14:05`."""
    with suppress(OverflowError, OSError, ValueError):
        return time.strftime("%H:%M", time.localtime(number(event.get("time"))))
    return "--:--"


def show(row: Row, key: str, spec: str) -> str:
    """A figure of a row, or a dash; `spec` is that of `format`."""
    value = number(row.get(key))
    if value is None:
        return DASH
    return format(int(value) if spec == "d" else value, spec)


def compact(value: Any) -> str:
    """A detail of an event, with four significant digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return " ".join(f"{key}={compact(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(compact, value))
    return str(value)


def printable(text: str) -> str:
    """Without control characters, which could move the cursor of a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))
