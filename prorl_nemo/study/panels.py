"""Small charts side by side in one SVG: some runs, thin, and their mean.

Every chart has the same steps below and a scale of its own, so that what changes can be seen, not
what is large. The large figures are drawn by `reporting.figure`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from prorl_nemo.reporting.figure import STYLE, ticks

Points = Sequence[tuple[int, float]]

WIDTH, ROW = 860, 176  # pixels
_GAP, _LEFT, _TOP, _BOTTOM = 22, 44, 30, 24  # around a chart's plot
_TITLE, _FOOT = 44, 20

_OWN = """
.small { font-size: 12.5px; font-weight: 620; fill: #161a22 } .thin { opacity: .3; stroke-width: 1 }
.at { stroke: #8a4fd8; stroke-dasharray: 2 3; opacity: .5 }
@media (prefers-color-scheme: dark) { .small { fill: #e8ebf1 } .at { stroke: #b78bff } }"""
PANEL_STYLE = STYLE + _OWN


@dataclass(frozen=True)
class Curve:
    """Attributes:
    points: (step, value), at least one.
    colour: 0 to 5.
    thin: a single run behind the mean.
    """

    points: Points
    colour: int = 0
    thin: bool = False


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
    marks: steps with a dotted line.
    from_zero: zero is in sight; else what differs between curves is as large as it can be.
    """

    title: str
    curves: Sequence[Curve]
    marks: Sequence[int] = ()
    from_zero: bool = True


def draw_panels(panels: Sequence[Panel], title: str, columns: int = 3) -> str:
    """The figure as SVG text. Panels without curves are left out; at least one has some."""
    drawn = [panel for panel in panels if panel.curves]
    last = max(curve.points[-1][0] for panel in drawn for curve in panel.curves)
    rows = -(-len(drawn) // columns)
    width = (WIDTH - _GAP * (columns - 1)) / columns
    height = _TITLE + rows * ROW + _FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" aria-label="{escape(title)}">',
        f"<style>{PANEL_STYLE}</style>",
        f'<text class="title" x="0" y="24">{escape(title)}</text>',
    ]
    for place, panel in enumerate(drawn):
        row, column = divmod(place, columns)
        parts += _panel(panel, column * (width + _GAP), _TITLE + row * ROW, width, max(last, 1))
    foot = f'<text x="{WIDTH / 2:.0f}" y="{height - 6}" text-anchor="middle">training step</text>'
    return "\n".join([*parts, foot, "</svg>", ""])


def _panel(panel: Panel, left: float, top: float, width: float, last: int) -> list[str]:
    values = [value for curve in panel.curves for _, value in curve.points]
    low, high = min(values), max(values)
    if panel.from_zero:
        low = min(0.0, low)
    if high <= low:
        high = low + (abs(low) or 1.0)
    space = 0.05 * (high - low)
    high += space
    low -= 0.0 if panel.from_zero else space
    x0, x1, y0, y1 = left + _LEFT, left + width - 20, top + ROW - _BOTTOM - 14, top + _TOP

    def x(step: float) -> float:
        return x0 + step / last * (x1 - x0)

    def y(value: float) -> float:
        return y0 - (value - low) / (high - low) * (y0 - y1)

    parts = [f'<text class="small" x="{left:.1f}" y="{top + 16:.1f}">{escape(panel.title)}</text>']
    for value in ticks(low, high, 3):
        parts += [
            _line("grid", x0, y(value), x1, y(value)),
            f'<text x="{x0 - 6:.1f}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>',
        ]
    for step in ticks(0, last, 3):
        parts.append(
            f'<text x="{x(step):.1f}" y="{y0 + 17:.1f}" text-anchor="middle">{step:,g}</text>'
        )
    parts += [_line("at", x(step), y0, x(step), y1) for step in panel.marks]
    for curve in panel.curves:
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in curve.points)
        kind = "curve thin" if curve.thin else "curve"
        parts.append(f'<g class="c{curve.colour}"><path class="{kind}" d="M{path}"/></g>')
    return parts


def _line(kind: str, xa: float, ya: float, xb: float, yb: float) -> str:
    return f'<line class="{kind}" x1="{xa:.1f}" y1="{ya:.1f}" x2="{xb:.1f}" y2="{yb:.1f}"/>'
