"""Validation curves of some runs as an SVG: `python -m prorl_nemo.reporting.figure RUN...`

Our choice: written by hand, so that a README gets a small file that follows the
reader's light or dark theme. A run's band is two standard errors each side: of
the mean over the validation's samples, not over seeds; each seed is drawn by itself.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from prorl_nemo.errors import UserError
from prorl_nemo.reporting.run import Run, read_run, validation_scores

WIDTH, HEIGHT = 860, 400  # pixels
LEFT, RIGHT, TOP, BOTTOM = 52, 190, 52, 344  # edges of the plot; names stand right of it
LABEL_HEIGHT = 17
COLOURS = 6

STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #5d6675 }
.title { font-size: 16px; font-weight: 650; fill: #161a22 } .name { font-weight: 600 }
.grid { stroke: #e3e7ed } .curve { fill: none; stroke-width: 2.2; stroke-linejoin: round } .band { opacity: .15 }
.c0 { --c: #2f62d9 } .c1 { --c: #e2762b } .c2 { --c: #11967a } .c3 { --c: #8a4fd8 } .c4 { --c: #d43d74 } .c5 { --c: #a67c00 }
.curve { stroke: var(--c) } .band, .dot, .name { fill: var(--c) }
@media (prefers-color-scheme: dark) {
 text { fill: #9aa4b4 } .title { fill: #e8ebf1 } .grid { stroke: #2c333e } .band { opacity: .2 }
 .c0 { --c: #7aa5ff } .c1 { --c: #ff9d5c } .c2 { --c: #3fd0ac } .c3 { --c: #b78bff } .c4 { --c: #ff7eab } .c5 { --c: #e3bb4a }
 .name { fill: var(--c) }
}"""  # noqa: E501

Point = tuple[int, float, float, float]  # step, mean, lower and upper edge of the band


def validation_points(run: Run) -> list[Point]:
    """Every validation, two standard errors each side."""
    return [(step, m, m - 2 * error, m + 2 * error) for step, m, error in validation_scores(run)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values inside [low, high], about `count` of them, in steps of 1, 2, 2.5 or 5."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(m for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def draw(curves: Sequence[tuple[str, Sequence[Point]]], title: str) -> str:
    """The figure as SVG text. `curves`: (name, points), each with at least one point."""
    points = [point for _, curve in curves for point in curve]
    last_step = max(max(step for step, *_ in points), 1)
    low = min(lower for _, _, lower, _ in points)
    high = max(upper for *_, upper in points)
    if 0 <= low < 0.4 * high:
        low = 0.0
    high = max(high + 0.05 * (high - low), low + 1e-9)

    def x(step: float) -> float:
        return LEFT + step / last_step * (WIDTH - RIGHT - LEFT)

    def y(value: float) -> float:
        return BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="28">{escape(title)}</text>',
    ]
    for value in ticks(low, high, 6):
        parts.append(_line(LEFT, y(value), WIDTH - RIGHT, y(value)))
        parts.append(_text(LEFT - 8, y(value) + 4, f"{value:g}", "end"))
    for step in ticks(0, last_step, 8):
        parts.append(_text(x(step), BOTTOM + 20, f"{step:,g}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, BOTTOM + 42, "training step", "middle"))
    labels = _spread([y(curve[-1][1]) for _, curve in curves])
    for i, ((name, curve), label) in enumerate(zip(curves, labels, strict=True)):
        upper = [(x(s), y(edge)) for s, _, _, edge in curve]
        lower = [(x(s), y(edge)) for s, _, edge, _ in reversed(curve)]
        end_step, end, *_ = curve[-1]
        parts += [
            f'<g class="c{i % COLOURS}">',
            f'<path class="band" d="{_path([*upper, *lower])}Z"/>',
            f'<path class="curve" d="{_path([(x(s), y(m)) for s, m, *_ in curve])}"/>',
            f'<circle class="dot" cx="{x(end_step):.1f}" cy="{y(end):.1f}" r="3.2"/>',
            f'<text class="name" x="{x(end_step) + 10:.1f}" y="{label + 4:.1f}">'
            f"{end:.3f} {escape(_short(name))}</text>",
            "</g>",
        ]
    return "\n".join([*parts, "</svg>", ""])


def write_figure(run_dirs: Sequence[Path], out: Path, title: str = "") -> None:
    """Draw the runs' validation curves into the file `out`.

    Raises:
        UserError: a run cannot be read or has no validation yet.
    """
    curves = []
    for run_dir in run_dirs:
        run = read_run(run_dir, with_samples=False)
        points = validation_points(run)
        if not points:
            raise UserError(f"{run_dir}: no validation yet, so there is no curve to draw")
        curves.append((run.name, points))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(draw(curves, title or "Validation score, ± 2 standard errors"), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m prorl_nemo.reporting.figure",
        description=("Draw validation curves of one or several runs."),
    )
    parser.add_argument("run_dirs", metavar="RUN", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the SVG file to write")
    parser.add_argument("--title", default="")
    chosen = parser.parse_args(arguments)
    try:
        write_figure(chosen.run_dirs, chosen.out, chosen.title)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _spread(heights: Sequence[float]) -> list[float]:
    """Heights of labels, moved down where they would overlap, and up again from below the plot;
    their order kept."""
    placed = [0.0] * len(heights)
    order = sorted(range(len(heights)), key=heights.__getitem__)
    free = -math.inf
    for i in order:
        placed[i] = max(heights[i], free)
        free = placed[i] + LABEL_HEIGHT
    lowest: float = BOTTOM
    for i in reversed(order):
        placed[i] = min(placed[i], lowest)
        lowest = placed[i] - LABEL_HEIGHT
    return placed


def _short(name: str, limit: int = 20) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


if __name__ == "__main__":
    sys.exit(main())
