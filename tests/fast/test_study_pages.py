"""Figures and tables of results, as Markdown and as HTML."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from studies import small_recipe, study, write
from typer.testing import CliRunner

from prorl_nemo.cli import app
from prorl_nemo.study.analysis import (
    CONTRADICTS,
    Estimate,
)
from prorl_nemo.study.blocks import Cards, Figure, Heading, Table, Text, render_html
from prorl_nemo.study.compact import (
    write_result,
)
from prorl_nemo.study.forest import draw_forest
from prorl_nemo.study.pages import PAGE, write_pages
from prorl_nemo.study.panels import Curve, Panel, draw_panels


def test_forest_by_hand() -> None:
    rows = [
        ("a", Estimate(0.2, 0.1, 3)),
        ("<b>", Estimate(-0.1, 0.2, 3)),
        ("c", Estimate(0.0, None, 1)),
        ("d", Estimate(-0.1, 0.05, 3)),
        ("e", Estimate(-0.1, 0.0, 3)),
    ]
    root = ET.fromstring(draw_forest(rows, "t"))
    dots = [float(dot.attrib["cx"]) for dot in root.iter("{http://www.w3.org/2000/svg}circle")]
    # The reach is 0.3 each side, and zero in the middle of 190 ... 700.
    assert dots[2] == pytest.approx(445.0)
    assert dots[0] - 445 == pytest.approx(2 * (445 - dots[1]), abs=0.2)
    classes = [g.attrib["class"] for g in root.iter("{http://www.w3.org/2000/svg}g")]
    assert classes == ["c2", "c0", "c0", "c4", "c0"]
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "+0.200 ± 0.100" in texts and "<b>" in texts and "+0.000, one run" in texts
    assert any("Green: above zero" in (text or "") for text in texts)


def test_panels_by_hand() -> None:
    panels = [
        Panel("<a>", [Curve([(0, 0.0), (100, 1.0)]), Curve([(0, 0.5)], 1, thin=True)], marks=[50]),
        Panel("empty", []),
        Panel("flat", [Curve([(0, 2.0), (50, 2.0)])]),
    ]
    root = ET.fromstring(draw_panels(panels, "t", columns=2))
    paths = [path.attrib for path in root.iter("{http://www.w3.org/2000/svg}path")]
    assert [path["class"] for path in paths] == ["curve", "curve thin", "curve"]
    first, last = (
        tuple(map(float, point.split())) for point in paths[0]["d"].removeprefix("M").split("L")
    )
    # The range of steps fills the width, and the highest value is just below the top.
    assert (first[0], last[0]) == (44.0, 399.0) and first[1] > last[1] > 44 + 30
    # All panels have the same steps: half of them is half of the width.
    flat = [float(point.split()[0]) for point in paths[2]["d"].removeprefix("M").split("L")]
    assert flat[1] - flat[0] == pytest.approx((last[0] - first[0]) / 2, abs=0.11)
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "<a>" in texts and "empty" not in texts and texts[-1] == "training step"
    marks = [line for line in root.iter() if line.attrib.get("class") == "at"]
    assert [float(mark.attrib["x1"]) for mark in marks] == [221.5]


def test_panels_with_and_without_zero() -> None:
    """The plot is 108 pixels high; 5 % of the range is left above, without zero below too."""
    curve = Curve([(0, 0.5), (1, 0.6)])
    heights = []
    for panel in (Panel("a", [curve]), Panel("a", [curve], from_zero=False)):
        root = ET.fromstring(draw_panels([panel], "t"))
        (path,) = (path.attrib["d"] for path in root.iter("{http://www.w3.org/2000/svg}path"))
        first, last = (float(point.split()[1]) for point in path.removeprefix("M").split("L"))
        heights.append(first - last)
    assert heights == pytest.approx([108 * 0.1 / 0.63, 108 * 0.1 / 0.11], abs=0.11)


def test_pages(tmp_path: Path) -> None:
    assert not write_pages(study(tmp_path)) and not (tmp_path / "results").exists()
    for seed, shift in ((1, 0.0), (2, 0.02)):
        write(tmp_path, "main", seed, shift)
        write(tmp_path, "no_kl", seed, -0.1 + shift / 2)
    (tmp_path / "results" / "old.svg").write_text("of an earlier page")
    assert write_pages(study(tmp_path))
    page = (tmp_path / "results" / "README.md").read_text()
    # Start, thirds and end of the main run: 0.2 and 0.22, Student's t of one degree of freedom.
    assert "| trained, mean | 0.210 ± 0.127 | 0.310 ± 0.127 | 0.360 ± 0.127 |" in page
    # And the paired gains, of the run and of its last third.
    assert "| 0.410 ± 0.127 | 0.200 ± 0.000 | 0.050 ± 0.000 |" in page
    # All of the seeds gain the same: 0.3 over the run. Half of that in the means of windows.
    agree = "runs agree to the digit: not decided"
    assert f"| validation rises over the run | 0.200 ± 0.000 | {agree} |" in page
    assert f"| tasks never trained on gain as well | 0.000 ± 0.000 | {agree} |" in page
    assert "| **arithmetic** | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.000 ± 0.000 |" in page
    assert "| aiw (unseen) | 0.250 ± 0.000 |" in page
    assert "| **all** | 2.0 | 1.0 | 1.0 | 1.0 | 0.0 | 0.0 |" in page
    # Of 256 samples 0 and 5 were right before; the first model is one, so without an interval.
    assert "| trained, start | 0.010 |" in page and "| trained, end | 0.098 ± 0.000 |" in page
    assert "mean over seeds; 64 tokens of response before and after." in page
    # At step 200 the last two validations: 0.35 less 0.1, and 0.37 less 0.11.
    assert "| no_kl | Without KL | 2 | 0.255 ± 0.064 | -0.105 ± 0.064 |" in page
    assert "| no_kl | lower | as the paper |" in page
    assert "| seeds | mean | less main | pass@4 | less main | unseen, mean |" in page
    # Ten steps with 50,000 tokens each, and ten with 70,000.
    assert "| seed 1 | 300 | 10 min | 2 | 1 | 100 | 1.2 M | 0 | p, 2 cores |" in page
    assert "| seed 2 | 2 | 150 (kl spike), 1,150 (interval) |" in page
    assert "paired by seed: both ends are measured with 8192 tokens" in page
    assert "absent" not in page
    figures = re.findall(r"\((\w+\.svg)\)", page)
    assert sorted(figures) == sorted(file.name for file in (tmp_path / "results").glob("*.svg"))
    assert len(figures) == 7
    for name in figures:
        assert ET.parse(tmp_path / "results" / name).getroot().tag.endswith("svg")
    tables = [line for line in page.splitlines() if line.startswith("|")]
    for first, second in itertools.pairwise(tables):
        if second.startswith("| ---"):
            assert first.count("|") == second.count("|")
    html = (tmp_path / "results" / PAGE).read_text()
    assert html.count("<svg") == 7 and html.count("<style>") == 1 and "<script" not in html


def test_a_single_main_run_has_a_page_without_intervals(tmp_path: Path) -> None:
    write(tmp_path, "main", 3, probe=None)
    assert write_pages(study(tmp_path))
    page = (tmp_path / "results" / "README.md").read_text()
    assert "| validation rises over the run | 0.200 | one run: not decided |" in page
    assert "Variants" not in page and "newly solved" not in page
    assert "![Mean score on held-out prompts, 1 seed](main.svg)" in page
    assert "intervals over seeds" not in page


def test_the_page_names_all_versions_and_the_time_of_all_runs(tmp_path: Path) -> None:
    write(tmp_path, "main", 1, versions={"torch": "2.7", "vllm": "1"})
    write(tmp_path, "main", 2, versions={"torch": "2.8", "vllm": "1"})
    write(tmp_path, "no_kl", 1, versions={"torch": "2.7", "vllm": "1"})
    write_pages(study(tmp_path))
    about = "3 runs, 0.5 hours, from the model aaaaaaaaaaaa; torch 2.7 and 2.8, vllm 1"
    for name in ("README.md", PAGE):
        assert about in (tmp_path / "results" / name).read_text()


def test_bands_are_the_intervals_of_the_tables(tmp_path: Path) -> None:
    """Two standard errors are no 95 % of two or three seeds."""
    for seed, shift in ((1, 0.0), (2, 0.02)):
        write(tmp_path, "main", seed, shift)
    write_pages(study(tmp_path))
    root = ET.parse(tmp_path / "results" / "main.svg").getroot()
    paths = [path.attrib for path in root.iter("{http://www.w3.org/2000/svg}path")]
    band, line = (
        [float(point.split()[1]) for point in path["d"].strip("MZ").split("L")]
        for path in paths[:2]
    )
    # The band has an upper and a lower edge; the scores rise by 0.3 over the run.
    width, rise = band[-1] - band[0], line[0] - line[-1]
    assert width / rise == pytest.approx(2 * 12.706 * 0.01 / 0.3, rel=0.01)
    page = (tmp_path / "results" / "README.md").read_text()
    title = "Mean score on held-out prompts, 2 seeds, 95 % intervals over seeds"
    assert f"![{title}](main.svg)" in page


def test_a_variant_is_drawn_beside_the_main_runs_of_its_seeds(tmp_path: Path) -> None:
    """As its difference is taken: another seed of the main run would set the curves apart."""
    write(tmp_path, "main", 1)
    write(tmp_path, "main", 2, 0.3)
    write(tmp_path, "no_kl", 1)
    write_pages(study(tmp_path))
    root = ET.parse(tmp_path / "results" / "variants.svg").getroot()
    paths = [path.attrib["d"] for path in root.iter("{http://www.w3.org/2000/svg}path")]
    # A run of each, and their means.
    assert len(paths) == 4 and len(set(paths)) == 1
    assert "| 0.000 |" in (tmp_path / "results" / "README.md").read_text()


def test_a_validation_without_a_task_leaves_out_that_step(tmp_path: Path) -> None:
    file = write(tmp_path, "main", 1)
    found = json.loads(file.read_text())
    found["tasks"]["gcd"] = {"category": "arithmetic", "trained": True}
    found["validation"] |= {"gcd": [0.5, None, 0.5, 0.5], "pass/gcd": [1.0, None, 1.0, 1.0]}
    write_result(file, found)
    write_pages(study(tmp_path))
    root = ET.parse(tmp_path / "results" / "categories.svg").getroot()
    paths = [path.attrib["d"] for path in root.iter("{http://www.w3.org/2000/svg}path")]
    assert [path.count("L") for path in paths] == [2, 2, 3, 3]


def test_tasks_of_no_category_have_a_page_too(tmp_path: Path) -> None:
    write(tmp_path, "main", 1, tasks={})
    write_pages(study(tmp_path))
    page = (tmp_path / "results" / "README.md").read_text()
    assert "By category" not in page and "| trained, mean | 0.200 |" in page


def test_gains_measured_with_two_limits_are_said_to_be(tmp_path: Path) -> None:
    stages = [{"steps": 200, "max_response_tokens": 48}, {"steps": 100, "max_response_tokens": 72}]
    raw = small_recipe(tmp_path, stages=stages).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    write(tmp_path, "main", 1)
    write_pages(study(tmp_path))
    page = (tmp_path / "results" / "README.md").read_text()
    # The last third begins with the validations of steps 100 and 200, and ends with 300's too.
    differs = "the response limit differs, 48 tokens at its start, 48 and 72 at its end."
    assert f"paired by seed: {differs}" in page and f"Gain over the run: {differs}" in page
    assert "of its stage: 48 tokens up to step 200, 72 tokens up to step 300." in page


def test_limits_are_those_of_stages_that_ended_early(tmp_path: Path) -> None:
    stages = [{"steps": 200, "max_response_tokens": 48}, {"steps": 250, "max_response_tokens": 72}]
    raw = small_recipe(tmp_path, stages=stages).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    events = [{"step": step, "event": "stage_started", "stage": i} for i, step in ((0, 1), (1, 51))]
    write(tmp_path, "main", 1, events=events, steps=300)
    write_pages(study(tmp_path))
    page = (tmp_path / "results" / "README.md").read_text()
    assert "of its stage: 48 tokens up to step 50, 72 tokens up to step 300." in page
    assert "paired by seed: both ends are measured with 72 tokens of response." in page
    assert "Gain over the run: the response limit differs, 48 tokens at its start, 72" in page


def test_html_shows_text_as_text() -> None:
    blocks = [
        Heading("<b>"),
        Text("*so* & so"),
        Table(["", "verdict"], [["<i>", CONTRADICTS]]),
        Cards([("<", "1", ">")]),
        Figure("f", draw_forest([("<script>", Estimate(0.1, None, 1))], "t"), "t"),
    ]
    page = render_html("k", "<t>", "a", blocks)
    for piece in ("<h2>&lt;b&gt;</h2>", "<i>so</i> &amp; so", "&lt;i&gt;", "&lt;script&gt;"):
        assert piece in page
    assert f'<td class="bad">{CONTRADICTS}</td>' in page and "<script" not in page


def test_the_command_writes_pages_or_says_why_not(tmp_path: Path) -> None:
    plan = study(tmp_path)
    (tmp_path / "study.yaml").write_text(json.dumps(plan.model_dump(mode="json")))
    arguments = ["study", str(tmp_path / "study.yaml"), "--pages"]
    nothing = CliRunner().invoke(app, arguments)
    assert nothing.exit_code == 2 and "holds no result of this study yet" in nothing.output
    write(tmp_path, "main", 1)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (tmp_path / "results" / PAGE).is_file()
    write(tmp_path, "no_kl", 1, model_sha256="b" * 64)
    mixed = CliRunner().invoke(app, arguments)
    assert mixed.exit_code == 2 and "another first model" in mixed.output
