"""Result tables, made once and shown twice: on a terminal, and as Markdown.

Scores are in percent, as papers print them; ± is one standard error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from prorl_nemo.evaluation.result import BenchmarkResult, ModelsCompared

MISSING = "–"  # noqa: RUF001 - the typographic dash stands for a missing figure
# What a name or reason quotes must not steer the terminal.
_CONTROL = dict.fromkeys((*range(32), 127, *range(128, 160)), " ")


@dataclass(frozen=True)
class Table:
    """A table as texts. Columns after the first `left` are numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    left: int = 1

    def markdown(self) -> str:
        """As Markdown, with the title in bold above."""
        align = ["---"] * self.left + ["---:"] * (len(self.columns) - self.left)
        lines = [self.columns, align, *([_cell(cell) for cell in row] for row in self.rows)]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(title=Text(self.title), box=box.SIMPLE_HEAD, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number < self.left else "right")
        for row in self.rows:
            table.add_row(*(Text(cell.translate(_CONTROL)) for cell in row))
        return table


def scores_table(results: Sequence[BenchmarkResult], title: str) -> Table:
    """Averages with errors and interval, pass@n, votes, and what became of the samples."""
    columns = ["benchmark", "metric", "items", "score", "± items", "± samples", "95 %", "pass@n",
               "cons@n", "wrong", "no answer", "truncated", "tokens"]  # fmt: skip
    rows = []
    for result in results:
        mean, shares = result.average, result.shares
        votes = result.votes[max(result.votes)] if result.votes else None
        rows.append([
            result.name,
            f"{result.metric}@{mean.samples}",
            f"{mean.items}",
            percent(mean.mean),
            percent(mean.error_items),
            percent(mean.error_samples),
            f"{percent(result.interval.low)} to {percent(result.interval.high)}",
            percent(result.pass_curve[-1]),
            percent(votes),
            percent(shares.wrong + shares.partial),
            percent(shares.no_answer),
            percent(shares.truncated),
            f"{shares.tokens:,.0f}",
        ])  # fmt: skip
    return Table(title, columns, rows, left=2)


def comparison_table(results: Sequence[BenchmarkResult]) -> Table:
    """Ours beside every published number, with difference, noise and what is not the same."""
    columns = ["benchmark", "reported for", "source", "not the same", "verdict", "ours",
               "reported", "difference", "95 % noise"]  # fmt: skip
    rows = [
        [
            result.name,
            found.reported.model,
            found.reported.source,
            "; ".join(found.mismatches) or "nothing known",
            verdict(found.inside_noise),
            percent(result.average.mean),
            f"{found.reported.value:g}",
            f"{found.difference:+.2f}",
            MISSING if found.noise is None else f"{found.noise:.2f}",
        ]
        for result in results
        for found in result.comparisons
    ]
    return Table("Beside reported numbers", columns, rows, left=5)


def other_readings_table(results: Sequence[BenchmarkResult]) -> Table:
    """Other means over the same samples: by task and category, and IFEval's four readings."""
    rows = []
    for result in results:
        readings: Mapping[str, float | None] = {
            "mean over tasks": result.task_mean,
            "mean over categories": result.category_mean,
            **{name.replace("_", " "): value for name, value in result.extra.items()},
        }
        rows += [
            [result.name, name, percent(value)]
            for name, value in readings.items()
            if value is not None
        ]
    return Table("Other readings of the same samples", ["benchmark", "reading", "score"], rows, 2)


def models_table(compared: Sequence[ModelsCompared], a: str, b: str) -> Table:
    """The paired comparison of two models."""
    columns = ["benchmark", "metric", "items", a, b, "difference", "± items", "95 %", "p",
               "p, adjusted"]  # fmt: skip
    rows = [
        [
            found.name,
            found.metric,
            f"{found.paired.items}",
            percent(found.mean_a),
            percent(found.mean_b),
            f"{100 * found.paired.difference:+.2f}",
            percent(found.paired.error),
            f"{100 * found.paired.interval.low:+.2f} to {100 * found.paired.interval.high:+.2f}",
            f"{found.paired.p_value:.4f}",
            f"{found.adjusted_p:.4f}",
        ]
        for found in compared
    ]
    return Table("The same items, paired", columns, rows, left=2)


def markdown_report(results: Sequence[BenchmarkResult], manifest: Mapping[str, Any]) -> str:
    """The whole result as one Markdown page."""
    model, protocol = manifest["model"], manifest["protocol"]
    sampling = protocol["sampling"]
    pinned = model.get("sha256")
    parts = [
        f"# {_cell(model['name'])} under `{_cell(protocol['label'])}`",
        f"Temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}, at most "
        f"{sampling['max_tokens']:,} tokens; seed {manifest['seed']}; "
        + (f"model sha256 `{pinned[:16]}`." if pinned else "the model cannot be pinned."),
        scores_table(results, "Scores, in percent").markdown(),
    ]
    for table in (other_readings_table(results), comparison_table(results)):
        if table.rows:
            parts.append(table.markdown())
    notes = [f"* `{r.name}`: {_cell(note)}" for r in results for note in r.notes]
    doubts = [f"* `{r.name}`: {_cell(doubt)}" for r in results for doubt in r.doubts]
    doubts += [f"* protocol: {_cell(doubt)}" for doubt in protocol["doubts"]]
    if notes:
        parts.append("**Notes**\n\n" + "\n".join(notes))
    if doubts:
        parts.append("**Known differences to other harnesses**\n\n" + "\n".join(doubts))
    return "\n\n".join(parts) + "\n"


def percent(value: float | None) -> str:
    """A score in [0, 1] as percent with two digits."""
    return MISSING if value is None else f"{100 * value:.2f}"


def verdict(inside: bool | None) -> str:
    """Whether a difference is within the noise, in words."""
    return MISSING if inside is None else "inside noise" if inside else "outside noise"


def _cell(text: str) -> str:
    """Text that stays in its cell and is no markup."""
    text = " ".join(str(text).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
