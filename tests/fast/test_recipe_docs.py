"""docs/recipes.md is what the schema says today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prorl_nemo.recipe_docs import render, render_pretraining

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("name", "page"), [("recipes.md", render()), ("pretraining.md", render_pretraining())]
)
def test_the_committed_pages_are_current(name: str, page: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    assert text == page, "run python -m prorl_nemo.recipe_docs"


@pytest.mark.parametrize("page", [render(), render_pretraining()])
def test_every_link_leads_to_a_section(page: str) -> None:
    anchors = {
        heading.replace(".", "").lower() for heading in re.findall(r"^## `(.*)`$", page, re.M)
    }
    links = set(re.findall(r"\]\(#(.*?)\)", page))
    assert links == anchors


def test_rows_by_hand() -> None:
    page = render()
    for row in (
        "| `coefficient` | number ≥ 0 | `0.0001` | Beta. Technical report of v1: 1e-4. |",
        "| `data_parallel` ↻ | whole number ≥ 1 | `1` | Copies of the model",
        "| `precision` | `bf16`, `fp32` or null | `null` | The engine's type",
        "| `sources` | list of [section](#datasourcesn) | required | The mix of tasks",
        "| `overlong` | [section](#shapingoverlong) or null | `null` | DAPO's length penalty",
        "| `betas` | list of 2: number ≥ 0, < 1 | `[0.9, 0.999]` | Decay of Adam's two moments. |",
    ):
        assert row in page
    assert not re.search(r"\|\s*\|$", page.replace("| key | value | default | |", ""), re.M)
