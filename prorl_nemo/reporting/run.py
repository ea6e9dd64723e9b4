"""One run directory, read for people: columns to draw, a summary, samples to browse.

Our choice: everything a page shows is computed here, where it can be tested, and
the page only draws. Nothing in a run directory is trusted to be complete or well
typed: a run may be hours old and still running.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from prorl_nemo.errors import UserError
from prorl_nemo.training.metrics import (
    EVENTS,
    METRICS,
    Row,
    iter_rows,
    number,
    read_rows,
    sample_steps,
    samples_path,
)

SAMPLE_STEPS = 40  # steps whose samples a page carries, first and last included
SAMPLES_PER_STEP = 12
SAMPLES_READ_PER_STEP = 1024  # the rest of a large file is not looked at
TEXT_LIMIT = 9000  # characters of a turn or response; the middle of a longer one is left out
DECISION = "reset_decision"  # one a step: drawn as a curve, not listed
DIGITS = 5  # significant, of every number a page carries


@dataclass(frozen=True)
class Run:
    """A run directory as read: rows sorted by step, the last one of a repeated step."""

    name: str
    recipe_text: str
    recipe: dict[str, Any]
    train: list[Row]
    validation: list[Row]
    events: list[Row]
    samples: list[Row]

    @property
    def model(self) -> str:
        return str(self.recipe.get("model", "unknown model"))

    @property
    def total_steps(self) -> int | None:
        """Steps the recipe asks for, less those by which stages ended early; None where it does
        not say."""
        stages = self.recipe.get("stages")
        if not isinstance(stages, list):
            return None
        steps = [stage.get("steps") if isinstance(stage, dict) else None for stage in stages]
        known = [count for count in steps if isinstance(count, int)]
        return (
            sum(known) - sum(map(_saved_steps, self.events)) if len(known) == len(steps) else None
        )


def _saved_steps(event: Row) -> int:
    """Steps that an early end of a stage took from the run."""
    planned, step = event.get("planned_last_step"), event.get("step")
    early = event.get("event") == "stage_ended"
    return planned - step if early and isinstance(planned, int) and isinstance(step, int) else 0


def read_run(run_dir: Path, with_samples: bool = True) -> Run:
    """Read a run directory.

    Raises:
        UserError: it is not a run directory, has no rows yet, or a file is damaged.
    """
    run_dir = Path(run_dir)
    if not (run_dir / METRICS).is_file():
        raise UserError(f"{run_dir}: not a run directory, {METRICS} is missing")
    rows = read_rows(run_dir / METRICS)
    train = _by_step(row for row in rows if row.get("kind") == "train")
    validation = _by_step(row for row in rows if row.get("kind") == "validation")
    if not train and not validation:
        raise UserError(f"{run_dir}: {METRICS} has no rows yet; report on it after its first step")
    recipe_path = run_dir / "recipe.yaml"
    text = recipe_path.read_text("utf-8", errors="replace") if recipe_path.is_file() else ""
    return Run(
        name=run_dir.resolve().name,
        recipe_text=text,
        recipe=_parse_recipe(text),
        train=train,
        validation=validation,
        events=read_rows(run_dir / EVENTS),
        samples=pick_samples(run_dir) if with_samples else [],
    )


def columns(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """Rows as columns of numbers, None where a row lacks one; columns without numbers are left
    out."""
    keys = dict.fromkeys(key for row in rows for key in row)
    table = {key: [compact(row.get(key)) for row in rows] for key in keys}
    return {key: column for key, column in table.items() if any(v is not None for v in column)}


def spans(steps: Sequence[int], values: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """Runs of equal values as (first step, last step, value)."""
    found: list[tuple[int, int, Any]] = []
    for step, value in zip(steps, values, strict=True):
        if found and found[-1][2] == value:
            found[-1] = (found[-1][0], step, value)
        else:
            found.append((step, step, value))
    return found


def validation_scores(run: Run) -> list[tuple[int, float, float]]:
    """(step, mean, standard error) of every validation; an unknown error counts as 0."""
    return [
        (row["step"], mean, number(row.get("validation/stderr")) or 0.0)
        for row in run.validation
        if (mean := number(row.get("validation/mean"))) is not None
    ]


def stages(run: Run) -> list[dict[str, Any]]:
    """The stages trained so far: `from` and `to` (steps, inclusive), `name`, `limit` (tokens)."""
    steps = [row["step"] for row in run.train]
    by_step = {row["step"]: row for row in run.train}
    found = []
    for first, last, index in spans(steps, [row.get("stage") for row in run.train]):
        if index is not None:
            name = str(by_step[first].get("stage_name") or f"stage {index}")
            limit = compact(by_step[first].get("rollout/response_limit"))
            found.append({"from": first, "to": last, "name": name, "limit": limit})
    return found


def cosine_spans(run: Run) -> list[tuple[int, int]]:
    """Steps with the cosine length penalty, as inclusive spans."""
    steps = [row["step"] for row in run.train]
    on = [number(row.get("shaping/cosine_on")) == 1 for row in run.train]
    return [(first, last) for first, last, value in spans(steps, on) if value]


def breaks(run: Run) -> list[int]:
    """Steps that open a new regime (after a reset, with a new stage): no average crosses them."""
    resets = {step + 1 for step in event_steps(run, "reference_reset")}
    return sorted({*resets, *(stage["from"] for stage in stages(run)[1:])})


def kl_threshold(run: Run) -> dict[str, list[float | None]]:
    """The column `reset/kl_threshold`: above which each step's KL would have been a spike."""
    figures = {
        row["step"]: row.get("figures")
        for row in run.events
        if row.get("event") in (DECISION, "reference_reset") and isinstance(row.get("step"), int)
    }
    values = [figures.get(row["step"]) for row in run.train]
    column = [compact(v.get("kl_threshold")) if isinstance(v, dict) else None for v in values]
    return {"reset/kl_threshold": column} if any(v is not None for v in column) else {}


def event_steps(run: Run, event: str) -> list[int]:
    """Steps of all events of a name, in the order they happened."""
    found = (row.get("step") for row in run.events if row.get("event") == event)
    return [step for step in found if isinstance(step, int)]


def summary(run: Run) -> dict[str, Any]:
    """The figures of the summary cards. `seconds` is the time of the steps and validations the
    run kept; work lost to a crash and done again counts once."""
    state, reason = _state(run)
    times = [
        *(row.get("time/step") for row in run.train),
        *(row.get("time/validate") for row in run.validation),
    ]
    return {
        "state": state,
        "reason": reason,
        "model": run.model,
        "steps": run.train[-1]["step"] if run.train else 0,
        "total_steps": run.total_steps,
        "validation": _validation_summary(run),
        "seconds": sum(filter(None, map(number, times))),
        "generated_tokens": _total(run, "rollout/generated_tokens"),
        "resets": len(event_steps(run, "reference_reset")),
        "stages": len(stages(run)),
        "restarts": len(event_steps(run, "resumed")),
        "engine_restarts": len(event_steps(run, "engine_restarted")),
        "skipped_updates": _total(run, "policy/skipped_updates"),
        "prompts_dropped": len(event_steps(run, "prompt_dropped")),
    }


def pick_samples(run_dir: Path) -> list[Row]:
    """A selection of the run's samples, even over steps and varied within a step.

    Within a step the kinds (task, verdict, cut or not) take turns, so that a rare
    kind is seen. Texts are cut in the middle, where a long answer matters least.
    """
    steps = sample_steps(run_dir)
    count = min(SAMPLE_STEPS, len(steps))
    chosen = {steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)}
    picked: list[Row] = []
    for step in sorted(chosen):
        rows = islice(iter_rows(samples_path(run_dir, step)), SAMPLES_READ_PER_STEP)
        picked += [_sample(row, step) for row in _take_turns(rows, SAMPLES_PER_STEP)]
    return picked


def setting_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Recipe keys on which the runs differ, with each run's value (`-` where it has none)."""
    flat = [dict(_flatten(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    table = [(key, [settings.get(key, "-") for settings in flat]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def compact(value: Any, digits: int = DIGITS) -> float | None:
    """The number rounded to what a page needs; integers stay exact."""
    found = number(value)
    if found is None or isinstance(found, int):
        return found
    short = float(f"{found:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _by_step(rows: Iterable[Row]) -> list[Row]:
    latest = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}
    return [latest[step] for step in sorted(latest)]


def _parse_recipe(text: str) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _total(run: Run, key: str) -> float:
    return sum(number(row.get(key)) or 0 for row in run.train)


def _state(run: Run) -> tuple[str, str]:
    states = {
        "run_started": "running",
        "resumed": "running",
        "stopped": "stopped",
        "finished": "finished",
    }
    for event in reversed(run.events):
        if event.get("event") in states:
            return states[event["event"]], str(event.get("reason", ""))
    return "unknown", ""


def _validation_summary(run: Run) -> dict[str, Any] | None:
    points = [
        {"step": row["step"], "mean": mean, "stderr": number(row.get("validation/stderr"))}
        for row in run.validation
        if (mean := number(row.get("validation/mean"))) is not None
    ]
    if not points:
        return None
    start, last = points[0], points[-1]
    best = max(points, key=lambda point: point["mean"])
    errors = [start["stderr"], last["stderr"]]
    return {
        "start": start,
        "best": best,
        "last": last,
        "count": len(points),
        "gain": last["mean"] - start["mean"] if len(points) > 1 else None,
        # As if the two were independent; they share prompts, so this errs on the large side.
        "gain_stderr": None if None in errors else math.hypot(*errors),
    }


def _take_turns(rows: Iterable[Row], count: int) -> list[Row]:
    kinds: dict[Any, list[Row]] = {}
    for row in rows:
        score = number(row.get("score")) or 0.0
        verdict = "full" if score >= 1 else "part" if score > 0 else "none"
        cut = row.get("finish_reason") == "length"
        kinds.setdefault((str(row.get("task")), verdict, cut), []).append(row)
    taken: list[Row] = []
    for turn in range(count):
        taken += [rows[turn] for rows in kinds.values() if turn < len(rows)]
        if len(taken) >= count:
            break
    return taken[:count]


def _sample(row: Row, step: int) -> Row:
    messages = row.get("messages")
    listed = messages if isinstance(messages, list) else []
    turns = [turn for turn in listed if isinstance(turn, dict)]
    return {
        "step": step,
        "task": str(row.get("task", "")),
        "prompt_id": str(row.get("prompt_id", "")),
        "turns": [[str(t.get("role", "")), _cut(str(t.get("content", "")))] for t in turns],
        "response": _cut(str(row.get("response", ""))),
        "finish": str(row.get("finish_reason", "")),
        "reason": _cut(str(row.get("reason", ""))),
        **{key: compact(row.get(key)) for key in ("score", "shaped", "advantage", "tokens")},
    }


def _cut(text: str) -> str:
    if len(text) <= TEXT_LIMIT:
        return text
    half = TEXT_LIMIT // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n\n[… {left_out:,} characters left out …]\n\n{text[-half:]}"


def _flatten(recipe: dict[str, Any], limit: int = 2000) -> Iterable[tuple[str, str]]:
    """Leaves as (dotted key, text). At most `limit`: YAML aliases can stand for any number."""
    pending: list[tuple[str, Any]] = [("", recipe)]
    for _ in range(limit):
        if not pending:
            return
        key, value = pending.pop()
        items: list[tuple[Any, Any]]
        if isinstance(value, dict) and value:
            items = list(value.items())
        elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            items = list(enumerate(value))
        else:
            yield key, f"{value}"[:200]
            continue
        pending += [(f"{key}.{name}" if key else str(name), v) for name, v in reversed(items)]
