"""The report: one or several runs on one HTML page that needs nothing but itself.

Our choice: data as JSON inside the file, curves drawn by a script inside the file,
no network, so that a report can be mailed and opened in ten years. What a model
wrote is untrusted: it travels as JSON with `<` escaped, reaches the page only as
text nodes, and a content security policy admits no script but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from prorl_nemo.errors import UserError
from prorl_nemo.reporting.run import (
    DECISION,
    Run,
    breaks,
    columns,
    compact,
    cosine_spans,
    event_steps,
    kl_threshold,
    read_run,
    setting_differences,
    stages,
    summary,
)
from prorl_nemo.training.metrics import plain

SCRIPTS = ("series.js", "elements.js", "chart.js", "samples.js", "page.js")


def write_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Write the report of the runs to the file `out`, replacing it.

    Several runs are drawn over one another in the order given.

    Raises:
        UserError: no run given, the same one twice, or one that cannot be read.
    """
    if not run_dirs:
        raise UserError("report: name at least one run directory")
    resolved = [Path(run_dir).resolve() for run_dir in run_dirs]
    if len(set(resolved)) < len(resolved):
        raise UserError("report: a run directory is named twice")
    page = render_page([read_run(run_dir) for run_dir in resolved])
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", errors="replace")


def render_page(runs: Sequence[Run]) -> str:
    """The page as text."""
    names = _distinct([run.name for run in runs])
    models = ", ".join(dict.fromkeys(run.model for run in runs))
    written = datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC")
    data = {
        "runs": [_run_data(run, name) for run, name in zip(runs, names, strict=True)],
        "differences": setting_differences(runs) if len(runs) > 1 else [],
    }
    script = "\n".join(asset(name) for name in SCRIPTS)
    style = asset("report.css")
    return Template(asset("template.html")).substitute(
        kind="ProRL run report",
        policy=f"default-src 'none'; script-src {script_hash(script)}; "
        f"style-src {script_hash(style)}; base-uri 'none'; form-action 'none'",
        title=html.escape(" · ".join(names)),
        about=html.escape(f"{models} — {written}"),
        style=style,
        data=embed(data),
        script=script,
    )


def embed(data: Any) -> str:
    """JSON that cannot leave its script element: no `<`, `>` or `&`, ASCII only."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _run_data(run: Run, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "train": columns(run.train) | kl_threshold(run),
        "validation": columns(run.validation),
        "stages": stages(run),
        "cosine": cosine_spans(run),
        "breaks": breaks(run),
        "resets": event_steps(run, "reference_reset"),
        "restarts": event_steps(run, "resumed"),
        "events": [_event(event) for event in run.events if event.get("event") != DECISION],
        "samples": run.samples,
        "recipe": run.recipe_text,
        "summary": summary(run),
    }


def _event(event: dict[str, Any]) -> dict[str, Any]:
    shown = ("time", "step", "event")
    return {
        "time": compact(event.get("time"), digits=12),
        "step": compact(event.get("step")),
        "event": str(event.get("event", "event")),
        "details": plain({key: value for key, value in event.items() if key not in shown}),
    }


def _distinct(names: list[str]) -> list[str]:
    """Names told apart by a number where two directories are called the same."""
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]


def asset(name: str) -> str:
    """A file of the page."""
    return (files("prorl_nemo.reporting") / "assets" / name).read_text(encoding="utf-8")


def script_hash(text: str) -> str:
    """How a content security policy names a script or style of the page itself."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
