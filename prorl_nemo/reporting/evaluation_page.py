"""An evaluation on one HTML page: scores, pass@k curves, reported numbers, and the samples.

As the report of a run (`page`): nothing but itself, no network; what a model wrote travels as
escaped JSON and reaches the page only as text nodes. Of many samples the page holds a spread,
since a browser cannot hold gigabytes; all of them are in `samples.jsonl`.
"""

from __future__ import annotations

import bisect
import hashlib
import html
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from string import Template
from typing import Any

from prorl_nemo.reporting.page import asset, embed, script_hash

SCRIPTS = ("series.js", "elements.js", "samples.js", "evaluation.js")
# Twenty benchmarks of long responses make a page of ten megabytes, which still opens at once.
_ITEMS_SHOWN = 24
_SAMPLES_SHOWN = 2
_CHARACTERS = 8_000


def render_evaluation(document: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> str:
    """The page as text.

    Args:
        document: what `results.json` holds.
        rows: graded samples, in any order.
    """
    manifest = document["manifest"]
    model, protocol = str(manifest["model"]["name"]), manifest["protocol"]
    script = "\n".join(asset(name) for name in SCRIPTS)
    style = asset("report.css") + asset("evaluation.css")
    written = datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC")
    data = {**document, "samples": shown_samples(rows, manifest["benchmarks"])}
    return Template(asset("template.html")).substitute(
        kind="ProRL evaluation",
        policy=f"default-src 'none'; script-src {script_hash(script)}; "
        f"style-src {script_hash(style)}; base-uri 'none'; form-action 'none'",
        title=html.escape(model),
        about=html.escape(f"{protocol['label']} — {written}"),
        style=style,
        data=embed(data),
        script=script,
    )


def shown_samples(
    rows: Iterable[Mapping[str, Any]], benchmarks: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The first samples of some items, the same ones whatever the order of the rows. Long texts
    are cut in the middle, where they tell least."""
    # Of each benchmark the items with the lowest rank: a random subset, fixed by the ids.
    kept: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in benchmarks}
    ranks: dict[str, list[tuple[bytes, str]]] = {name: [] for name in benchmarks}
    for row in rows:
        name, item = str(row["benchmark"]), str(row["item"])
        if name not in kept or row["sample"] >= _SAMPLES_SHOWN:
            continue
        if item not in kept[name]:
            rank = (hashlib.blake2b(item.encode(), digest_size=8).digest(), item)
            bisect.insort(ranks[name], rank)
            if len(ranks[name]) > _ITEMS_SHOWN:
                _, left_out = ranks[name].pop()
                kept[name].pop(left_out, None)
                if left_out == item:
                    continue
            kept[name][item] = []
        kept[name][item].append(_shown(row))
    return [
        sample
        for items in kept.values()
        for item in sorted(items)
        for sample in sorted(items[item], key=lambda shown: int(shown["sample"]))
    ]


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A sample as the browser takes it."""
    return {
        **{key: row[key] for key in ("benchmark", "item", "sample", "tokens", "score")},
        # 63 bits: a number of JavaScript would lose the last ones.
        "seed": str(row["seed"]),
        "verdict": str(row["verdict"]).replace("_", " "),
        "reason": _cut(str(row["reason"])),
        "finish": "length" if row["truncated"] else "stop",
        "turns": [["prompt", _cut(str(row["prompt"]))]],
        "response": _cut(str(row["response"])),
    }


def _cut(text: str) -> str:
    if len(text) <= _CHARACTERS:
        return text
    half = _CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
