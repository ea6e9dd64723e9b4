"""A build's manifest as a table: what each source gave and what was taken out of it."""

from __future__ import annotations

from typing import Any

from rich.table import Table

_ROWS = {
    "rows": "rows read",
    "bad_rows": "bad rows",
    "duplicates": "duplicates",
    "contaminated": "evaluation questions",
    "beyond_limit": "beyond the limit",
    "train": "training prompts",
    "held_out": "held-out prompts",
}


def summary(manifest: dict[str, Any]) -> Table:
    """A column for each source, a row for each way a record can go."""
    sources = manifest["sources"]
    questions = sum(manifest["evaluation_questions"].values())
    table = Table(title=f"compared with {questions} evaluation questions")
    table.add_column("")
    for source in sources:
        table.add_column(source["source"], justify="right", overflow="fold")
    by_rule = sorted({key for source in sources for key in source if key.startswith("left out: ")})
    table.add_row("licence", *(source["licence"] for source in sources))
    for key, title in {**_ROWS, **{rule: rule for rule in by_rule}}.items():
        table.add_row(title, *(str(source.get(key, 0)) for source in sources))
    return table
