"""The page of an evaluation: its script in an embedded V8, on hostile text and odd figures."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from test_report_script import DOM, HOSTILE, Engine
from test_result import BENCHMARKS, EVAL, PROTOCOLS, made_up, part

from prorl_nemo.evaluation.reported import load_reported
from prorl_nemo.evaluation.result import benchmark_result
from prorl_nemo.evaluation.suite import Suite
from prorl_nemo.reporting.evaluation_page import render_evaluation, shown_samples


def rows(suite: Suite) -> list[dict[str, Any]]:
    return [
        {
            "benchmark": one.benchmark.name, "item": item.item_id, "sample": index,
            "seed": 2**62 + 1, "prompt": HOSTILE, "response": HOSTILE + "x" * 20_000, "tokens": 5,
            "truncated": index == 1, "score": index % 2, "verdict": "no_answer",
            "reason": HOSTILE, "answer": None, "parts": {},
        }
        for one in suite.parts
        for item in one.items.items
        for index in range(one.samples)
    ]  # fmt: skip


def suite_of(*names: str, items: int = 3, samples: int = 5) -> Suite:
    parts = []
    for name in names:
        tasks = BENCHMARKS[name].data.tasks[:2] or [name]
        parts.append(part(BENCHMARKS[name], [tasks[i % len(tasks)] for i in range(items)], samples))
    return Suite(PROTOCOLS["prorl"], "prorl", 0, parts)


def open_page(suite: Suite, path: Path) -> Engine:
    """The page's own data and script, run as a browser would."""
    reported = load_reported(EVAL / "reported", set(BENCHMARKS))
    results = [
        benchmark_result(one, made_up(one, 1), "prorl", reported, "m").as_json()
        for one in suite.parts
    ]
    manifest = suite.manifest({"name": HOSTILE, "sha256": None})
    document = {"manifest": manifest, "versions": {"torch": "1"}, "benchmarks": results}
    path.write_text(render_evaluation(document, rows(suite)), "utf-8")
    text = path.read_text("utf-8")
    assert text.count("</script>") == 2
    engine = Engine()
    engine.run(DOM)
    data = text.split('id="data">')[1].split("</script>")[0]
    engine.run(f"ids.data.textContent = {json.dumps(data)}")
    engine.run(text.split("<script>")[1].split("</script>")[0])
    return engine


def test_everything_is_shown_and_hostile_text_is_text(tmp_path: Path) -> None:
    page = open_page(suite_of("aime24", "reasoning_gym", "humaneval"), tmp_path / "page.html")
    text = page.run("ids.main.textContent")
    for wanted in ("Scores, in percent", "pass@k and votes", "Beside reported numbers", "cons@5",
                   "Other readings", "by task", "another model", "Samples", "What was asked",
                   "4611686018427387905", "characters ..."):  # fmt: skip
        assert wanted in text, wanted
    assert "</script><img src=x onerror=alert(1)>" in text
    assert page.run("tag('img').length + tag('script').length") == 0
    assert page.run("tag('path').every((e) => !/NaN|undefined|Infinity/.test(e.attributes.d))")
    assert page.run("tag('circle').length") == 3 * 5
    # No votes on programs: one curve only.
    lines = "tag('path').filter((e) => e.attributes.d.length > 0).length"
    assert page.run(lines) == 3 * 2 - 1


def test_samples_can_be_found(tmp_path: Path) -> None:
    page = open_page(suite_of("aime24", "humaneval"), tmp_path / "page.html")
    count = "every((e) => e.attributes.class === 'count')[0].textContent"
    assert page.run(count) == "12 of 12 samples"  # Two of five samples of each item.
    page.run("const which = tag('select')[0]; which.selectedIndex = 1; which.fire('change')")
    assert page.run(count) == "6 of 12 samples"


def test_a_single_sample_has_a_curve_of_one_point(tmp_path: Path) -> None:
    page = open_page(suite_of("gsm8k", items=1, samples=1), tmp_path / "page.html")
    assert page.run("tag('circle').length") == 1
    assert page.run(
        "tag('circle').every((e) => !/NaN/.test(`${e.attributes.cx}${e.attributes.cy}`))"
    )


def test_the_samples_that_are_shown_do_not_depend_on_the_order() -> None:
    suite = suite_of("math500", items=90, samples=6)
    found, names = rows(suite), suite.manifest({})["benchmarks"]
    shown = shown_samples(found, names)
    assert len(shown) == 24 * 2
    assert max(len(sample["response"]) for sample in shown) < 8_100
    random.Random(1).shuffle(found)
    assert shown_samples(found, names) == shown
    # A spread, not the first ones by name.
    assert len({sample["item"] for sample in shown if sample["item"] > "math500/045"}) > 5
