"""Differences to the main runs as dots with their intervals: a forest plot, in SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from prorl_nemo.reporting.figure import STYLE, ticks
from prorl_nemo.study.analysis import Estimate

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 860, 190, 700, 62, 26  # pixels
_COLOURS = {0: "c0", 1: "c2", -1: "c4"}


def draw_forest(rows: Sequence[tuple[str, Estimate]], title: str) -> str:
    """The figure as SVG text.

    Args:
        rows: (name, difference), at least one; a single run has a dot without an interval.
    """
    reach = max(abs(e.mean) + (e.half_width or 0.0) for _, e in rows) or 1.0
    bottom = _TOP + _ROW * len(rows)

    def x(value: float) -> float:
        return _LEFT + (value + 1.05 * reach) / (2.1 * reach) * (_RIGHT - _LEFT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 52}" '
        f'width="{_WIDTH}" height="{bottom + 52}" role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="20" y="28">{escape(title)}</text>',
    ]
    for value in ticks(-reach, reach, 6):
        heavy = ' stroke-width="2"' if value == 0 else ""
        parts.append(
            f'<line class="grid"{heavy} x1="{x(value):.1f}" y1="{_TOP - 14}" '
            f'x2="{x(value):.1f}" y2="{bottom}"/>'
        )
        parts.append(
            f'<text x="{x(value):.1f}" y="{bottom + 20}" text-anchor="middle">'
            f"{value:{'+g' if value else 'g'}}</text>"
        )
    parts.append(
        f'<text x="{_LEFT}" y="{bottom + 40}">Green: above zero, red: below; '
        "blue: the interval holds zero, or there is none</text>"
    )
    for place, (name, found) in enumerate(rows):
        y = _TOP + _ROW * place + 4
        half = found.half_width or 0.0
        parts += [
            # Green or red only where the interval does not hold zero.
            f'<g class="{_COLOURS[found.side]}">',
            f'<line class="curve" x1="{x(found.mean - half):.1f}" y1="{y}" '
            f'x2="{x(found.mean + half):.1f}" y2="{y}"/>',
            f'<circle class="dot" cx="{x(found.mean):.1f}" cy="{y}" r="4.5"/>',
            "</g>",
            f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>',
            f'<text x="{_RIGHT + 16}" y="{y + 4}">{found.mean:+.3f}'
            + (f" ± {half:.3f}" if found.half_width is not None else ", one run")
            + "</text>",
        ]
    return "\n".join([*parts, "</svg>", ""])
