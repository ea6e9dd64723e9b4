"""A page as a list of blocks, written twice: Markdown with figures beside it, and one HTML file.

The HTML holds its figures and styles and no script; nothing in it comes from a model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from prorl_nemo.reporting.page import asset, script_hash
from prorl_nemo.study.panels import PANEL_STYLE


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; *stressed* words between stars."""

    text: str


@dataclass(frozen=True)
class Figure:
    """An SVG, and the name of its file beside the Markdown."""

    name: str
    svg: str
    title: str


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Cards:
    """Figures to be seen first: (label, value, note)."""

    cards: Sequence[tuple[str, str, str]]


Block = Heading | Text | Figure | Table | Cards


def write_markdown(folder: Path, name: str, blocks: Sequence[Block]) -> None:
    """The page and its figures; figures of an earlier page that it has no more are deleted."""
    figures = {f"{block.name}.svg": block.svg for block in blocks if isinstance(block, Figure)}
    for file in folder.glob("*.svg"):
        if file.name not in figures:
            file.unlink(missing_ok=True)  # Processes that share a study write one page.
    for file_name, svg in figures.items():
        (folder / file_name).write_text(svg, encoding="utf-8")
    text = "\n".join(filter(None, map(_markdown, blocks)))
    (folder / name).write_text(text, encoding="utf-8")


def render_html(kind: str, title: str, about: str, blocks: Sequence[Block]) -> str:
    """The page as text."""
    # After the page's own: figures name some of their classes alike.
    style = asset("report.css") + asset("study.css") + PANEL_STYLE
    body = "\n".join(map(_html, blocks))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src {script_hash(style)}; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body class="study">
<header class="top">
<p class="kind">{escape(kind)}</p>
<h1>{escape(title)}</h1>
<p class="about">{escape(about)}</p>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}\n"
    if isinstance(block, Text):
        return f"{block.text}\n"
    if isinstance(block, Figure):
        return f"![{block.title}]({block.name}.svg)\n"
    if isinstance(block, Table):
        lines = [block.head, ["---"] * len(block.head), *block.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    return "\n".join(f"* {label}: **{value}** {note}" for label, value, note in block.cards) + "\n"


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_stressed(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f'<p class="said">{_stressed(block.text)}</p>'
    if isinstance(block, Figure):
        # Styled by the page: a policy against foreign styles admits one block of them.
        svg = re.sub(r"<style>.*?</style>\n?", "", block.svg, flags=re.DOTALL)
        return f'<figure class="card">{svg}</figure>'
    if isinstance(block, Table):
        head = "".join(f"<th>{_stressed(cell)}</th>" for cell in block.head)
        rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in block.rows)
        return (
            f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    cards = "".join(
        f'<div class="card"><span class="label">{escape(label)}</span>'
        f'<span class="value">{escape(value)}</span><span class="note">{escape(note)}</span></div>'
        for label, value, note in block.cards
    )
    return f'<div class="cards">{cards}</div>'


def _cell(text: str) -> str:
    kind = ' class="bad"' if text.startswith("contradicts") else ""
    return f"<td{kind}>{_stressed(text)}</td>"


def _stressed(text: str) -> str:
    """Markdown's stars as markup, everything else as text."""
    shown = escape(text)
    shown = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", shown)
    return re.sub(r"\*(.+?)\*", r"<i>\1</i>", shown)
