"""The report's script, run in an embedded V8: its arithmetic, and the whole page on a small DOM."""

from __future__ import annotations

import bisect
import json
import math
import random
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py_mini_racer import MiniRacer

from prorl_nemo.reporting.figure import ticks
from prorl_nemo.reporting.page import SCRIPTS, write_report
from prorl_nemo.training.live_text import duration
from prorl_nemo.training.metrics import RunLog

ASSETS = files("prorl_nemo.reporting") / "assets"
Call = Callable[..., Any]


class Engine(MiniRacer):
    """V8 whose answers are of any type, as far as the type checker knows."""

    def run(self, code: str) -> Any:
        return self.eval(code)


gappy = st.lists(st.none() | st.floats(-1e3, 1e3), min_size=1, max_size=120)


@pytest.fixture(scope="module")
def call() -> Call:
    engine = Engine()
    engine.run((ASSETS / "series.js").read_text())
    engine.run("const call = (name, json) => JSON.stringify(eval(name)(...JSON.parse(json)))")
    return lambda name, *arguments: json.loads(
        engine.run(f"call({json.dumps(name)}, {json.dumps(json.dumps(arguments))})")
    )


def test_smoothing_by_hand(call: Call) -> None:
    assert call("smooth", [1, 2, 3, 4], [0, 2, 4, 6], 2) == [1, 2, 4, 5]
    assert call("smooth", [1, 2, 3, 4], [0, 2, 4, 6], 2, [3]) == [1, 1, 5, 5]
    assert call("smooth", [1, 2, 3], [1, None, 3], 2) == [1, None, 3]
    # The window counts steps, not points: 10 and 20 are too far apart to be averaged.
    assert call("smooth", [10, 20], [1, 5], 8) == [1, 5]


@settings(max_examples=80, deadline=None)
@given(values=gappy, width=st.integers(2, 30), data=st.data())
def test_smoothing_against_a_slow_reference(
    call: Call, values: list[float | None], width: int, data: st.DataObject
) -> None:
    gaps = data.draw(st.lists(st.integers(1, 4), min_size=len(values), max_size=len(values)))
    steps = [sum(gaps[: i + 1]) for i in range(len(values))]
    breaks = sorted(data.draw(st.sets(st.integers(1, steps[-1]), max_size=4)))
    regime = [bisect.bisect_right(breaks, step) for step in steps]
    found = call("smooth", steps, values, width, breaks)
    for i, value in enumerate(values):
        if value is None:
            assert found[i] is None
            continue
        window = [v for j, v in enumerate(values)
                  if v is not None and abs(steps[j] - steps[i]) <= width / 2
                  and regime[j] == regime[i]]  # fmt: skip
        # Differences of running sums of at most 1.2e5 lose about 1e-10.
        assert found[i] == pytest.approx(math.fsum(window) / len(window), abs=1e-9)


def test_thinning_keeps_every_extreme(call: Call) -> None:
    noise = random.Random(5)
    for count, pixels in [(3000, 500), (3000, 111), (700, 300)]:
        steps = list(range(1, count + 1))
        values: list[float | None] = [noise.gauss(0, 1) for _ in steps]
        values[10:14] = [None] * 4
        kept = call("decimate", steps, values, pixels)
        assert kept == sorted(set(kept))
        assert len(kept) <= 5 * (pixels + 1)
        assert kept[0] == 0
        assert kept[-1] == count - 1
        cells: dict[int, list[int]] = {}
        for i, step in enumerate(steps):
            cells.setdefault(math.floor((step - 1) * pixels / (count - 1)), []).append(i)
        for cell in cells.values():
            present = [values[i] for i in cell if values[i] is not None]
            drawn = [values[i] for i in cell if i in set(kept) and values[i] is not None]
            if present:
                assert (min(drawn), max(drawn)) == (min(present), max(present))  # type: ignore[type-var]
            if any(values[i] is None for i in cell):
                assert any(values[i] is None for i in cell if i in set(kept))
    assert call("decimate", [1, 2, 3], [1, 2, 3], 100) == [0, 1, 2]


@settings(max_examples=100, deadline=None)
@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6), count=st.integers(2, 9))
def test_ticks_are_those_of_the_figure(call: Call, low: float, span: float, count: int) -> None:
    found = call("ticks", low, low + span, count)
    expected = ticks(low, low + span, count)
    assert found == expected
    # 1e-9 of a tick's own size is the slack the ends are given.
    slack = 1e-8 * (abs(low) + span)
    assert all(low - slack <= tick <= low + span + slack for tick in found)
    # Steps of 1, 2, 2.5, 5, 10 are at most 2.5 apart: never more than asked for and one.
    assert len(found) <= count + 1


def test_ticks_by_hand(call: Call) -> None:
    assert call("ticks", 0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1] == ticks(0, 1, 5)
    assert call("ticks", 0.001, 0.0031, 3) == [0.001, 0.002, 0.003]
    assert call("ticks", 3, 3, 5) == [3] == ticks(3, 3, 5)
    assert call("logTicks", 0.005, 200, 4) == [0.01, 1, 100]
    assert call("logTicks", 2, 6, 4) == [2, 4, 6]
    assert call("tickDigits", [0.9998, 1, 1.0002]) == 5
    assert call("tickDigits", [0, 1000, 2000]) == 3


@settings(deadline=None)
@given(steps=st.lists(st.integers(0, 50), max_size=30, unique=True), step=st.floats(-5, 60))
def test_index_at_against_bisect(call: Call, steps: list[int], step: float) -> None:
    steps.sort()
    assert call("indexAt", steps, step) == bisect.bisect_right(steps, step) - 1


def test_ranges_by_hand(call: Call) -> None:
    assert call("range", [1, 10], False) == pytest.approx([0, 10.54])  # zero is near
    assert call("range", [9, 10], False) == pytest.approx([8.94, 10.06])
    assert call("range", [None, 5], False) == pytest.approx([4.5, 5.5])
    assert call("range", [0, 0], False) == [0, 1]
    assert call("range", [], False) == [0, 1]
    assert call("range", [-1], True) == [0.1, 1]
    low, high = call("range", [0, 1e-3, 10], True)  # zero has no place on this axis
    assert low == pytest.approx(1e-3 / 1.15)
    assert high == pytest.approx(11.5)


def test_shares_keep_the_total(call: Call) -> None:
    noise = random.Random(2)
    column = [noise.random() for _ in range(3000)]
    thin = call("shares", list(range(3000)), [column, [None] * 3000], 500)
    assert len(thin["steps"]) == 500
    assert thin["columns"][1] == [0] * 500
    # 3,000 points over 500 shares is six each, so the mean of means is the mean.
    assert math.fsum(thin["columns"][0]) / 500 == pytest.approx(math.fsum(column) / 3000, rel=1e-12)
    assert call("shares", [1, 2, 3], [[1, 2, 6]], 2) == {"steps": [1.5, 3], "columns": [[1.5, 6]]}


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("format", [0.25, "%"], "25%"), ("format", [None], "–"), ("format", [2e-6], "2e-6"),  # noqa: RUF001
        ("format", [5000], "5,000"), ("format", [0], "0"), ("format", [12_500, "tokens"], "12.5k"),
        ("figure", [0.65], "0.6500"), ("figure", [0.12345, "%"], "12.3%"),
        ("figure", [8192], "8,192"),
        ("figure", [3.86e-4], "3.86e-4"), ("figure", [23.456, "s"], "23.5 s"),
        ("figure", [5911.4], "5,911"), ("figure", [None], "–"), ("short", [210_000_000], "210M"),  # noqa: RUF001
        ("short", [9_999], "9,999"), ("short", [2_300_000_000], "2.3B"),
    ],
)  # fmt: skip
def test_numbers_for_people(call: Call, name: str, arguments: list[Any], text: str) -> None:
    assert call(name, *arguments) == text


@pytest.mark.parametrize("seconds", [8, 751, 11_520, 190_800])
def test_durations_are_those_of_the_live_view(call: Call, seconds: int) -> None:
    padded = duration(seconds)
    assert call("duration", seconds) == " ".join(
        str(int(word)) if word.isdigit() else word for word in padded.split()
    )


# Just enough of a document to build the page in: elements remember what they were given.
DOM = """
class Element {
  constructor(tag) {
    this.tag = tag; this.attributes = {}; this.children = []; this.listeners = {};
    this.clientWidth = 600; this.selectedIndex = 0; this.scrollTop = 0;
    this.style = { setProperty() {} };
  }
  set textContent(text) { this.children = [String(text)]; }
  get textContent() { return this.children.map((c) => (c.tag ? c.textContent : c)).join(""); }
  get value() {
    return this.tag === "select" ? this.children[this.selectedIndex].textContent : this.text ?? "";
  }
  set value(text) { this.text = text; }
  append(...nodes) { this.children.push(...nodes.map((n) => (n.tag ? n : String(n)))); }
  replaceChildren(...nodes) { this.children = []; this.append(...nodes); }
  setAttribute(key, value) { this.attributes[key] = String(value); }
  addEventListener(kind, handler) { (this.listeners[kind] ??= []).push(handler); }
  fire(kind, event = {}) { (this.listeners[kind] ?? []).forEach((handler) => handler(event)); }
  getBoundingClientRect() { return { left: 0, top: 0 }; }
  scrollIntoView() {}
  remove() { this.removed = true; }
  set innerHTML(_) { throw new Error("markup is never parsed"); }
  *all() { yield this; for (const c of this.children) if (c.tag) yield* c.all(); }
}
const ids = { main: new Element("main"), data: new Element("script") };
const window = new Element("window");
let inSight = true;
const document = {
  createElement: (tag) => new Element(tag), createElementNS: (_, tag) => new Element(tag),
  getElementById: (id) => ids[id] ?? every((e) => e.attributes.id === id)[0] ?? null,
};
class IntersectionObserver {
  constructor(handler) { this.handler = handler; }
  observe(target) { this.handler([{ target, isIntersecting: inSight }]); }
}
class ResizeObserver { observe() {} }
const requestAnimationFrame = (handler) => { handler(); return null; };
const every = (test) => [...ids.main.all()].filter(test);
const tag = (name) => every((e) => e.tag === name);
"""

HOSTILE = "</script><img src=x onerror=alert(1)> <think>a</think> \u2028 ${x}"


def open_page(run_dirs: list[Path], out: Path, before: str = "") -> Engine:
    """The written file's own data and scripts, run as a browser would after `before`."""
    write_report(run_dirs, out)
    text = out.read_text("utf-8")
    data = text.split('id="data">')[1].split("</script>")[0]
    engine = Engine()
    engine.run(DOM + before)
    engine.run(f"ids.data.textContent = {json.dumps(data)}")
    script = text.split("<script>")[1].split("</script>")[0]
    assert script == "\n".join((ASSETS / name).read_text() for name in SCRIPTS)
    engine.run(script)
    return engine


def page_run(run_dir: Path, steps: int = 120) -> Path:
    noise = random.Random(steps)
    with RunLog(run_dir) as log:
        log.event("resumed", 50, note=HOSTILE)
        for step in range(1, steps + 1):
            log.metrics({
                "kind": "train", "step": step, "stage": step // 80, "stage_name": "s",
                "rollout/response_limit": 512, "shaping/cosine_on": int(step < 30),
                "reward/raw_mean": noise.random(), "reward/shaped_mean": noise.random(),
                "policy/kl": None if step == 7 else noise.random(), "reward/raw/sums": 0.5,
                "time/generate": 2.0, "time/train": 1.0, "time/step": 3.1, "my/own": 1.0,
            })  # fmt: skip
            if step % 10 == 0:
                log.metrics({"kind": "validation", "step": step, "validation/mean": noise.random(),
                             "validation/stderr": 0.02, "validation/sums": 0.4})  # fmt: skip
            if step % 40 == 0:
                log.event("reference_reset", step, figures={"kl": 0.01})
                log.samples(step, [
                    {"task": "sums", "response": HOSTILE, "score": score, "finish_reason": "stop",
                     "messages": [{"role": "user", "content": HOSTILE}]} for score in (0.0, 1.0)
                ])  # fmt: skip
    (run_dir / "recipe.yaml").write_text(f"model: m\nstages: [{{steps: {steps}}}]\n")
    return run_dir


def test_the_page_of_one_run(tmp_path: Path) -> None:
    page = open_page([page_run(tmp_path / "one")], tmp_path / "out.html")
    text = page.run("ids.main.textContent")
    for wanted in ["Validation", "KL to the reference", "Seconds per step", "my/own", "Samples",
                   "Events", "Settings", "reference reset", "of 120"]:  # fmt: skip
        assert wanted in text, wanted
    # What a model wrote is there, as text, and made no element.
    assert "</script><img src=x onerror=alert(1)>" in text
    assert page.run("tag('img').length + tag('script').length") == 0
    assert page.run("every((e) => e.attributes.class === 'reset-head').length") >= 3
    lines = "every((e) => e.tag === 'path' && /^line/.test(e.attributes.class))"
    # Reward has 2 smoothed curves over 2 raw ones, KL 1 over 1; validation, tasks, limit, own.
    assert page.run(f"{lines}.length") >= 10
    assert page.run(f"{lines}.every((e) => !/NaN|undefined|Infinity/.test(e.attributes.d))")


def test_hovering_zooming_and_filtering(tmp_path: Path) -> None:
    page = open_page([page_run(tmp_path / "one")], tmp_path / "out.html")
    page.run("const plot = () => page.charts[0].plot.children[0]")
    page.run("plot().fire('pointermove', { clientX: 300 })")
    step = page.run("page.step")
    # The plot is 600 wide with margins of 46 and 18: step 1 at 46, step 120 at 582.
    assert step == round(1 + (300 - 46) / (582 - 46) * 119)
    page.run("plot().fire('pointerdown', { clientX: 200, button: 0 })")
    page.run("plot().fire('pointermove', { clientX: 400 })")
    page.run("plot().fire('pointerup', { clientX: 400 })")
    assert page.run("page.range.join()") == "35,80"
    page.run("plot().fire('dblclick')")
    assert page.run("page.range.join()") == "1,120"
    page.run("every((e) => e.attributes.class === 'log').forEach((button) => button.fire('click'))")
    assert page.run("tag('path').every((e) => !/NaN|Infinity/.test(e.attributes.d))")
    count = "every((e) => e.attributes.class === 'count')[0].textContent"
    assert page.run(count) == "6 of 6 samples"
    page.run("const score = tag('select')[2]; score.selectedIndex = 1; score.fire('change')")
    assert page.run(count) == "3 of 6 samples"


def test_the_page_of_several_runs(tmp_path: Path) -> None:
    dirs = [page_run(tmp_path / name, steps) for name, steps in [("a", 120), ("b", 90), ("c", 50)]]
    page = open_page(dirs, tmp_path / "out.html")
    assert page.run("page.charts[0].current.length") == 3
    assert page.run("tag('tbody')[0].children.length") == 3
    page.run("page.hidden.add(data.runs[1]); page.redraw()")
    assert page.run("page.charts[0].current.map((l) => l.run.name).join()") == "a,c"
    page.run("const focus = tag('select')[0]; focus.selectedIndex = 2; focus.fire('change')")
    assert "Events · c" in page.run("ids.main.textContent")
    assert "stages.0.steps" in page.run("ids.main.textContent")


def test_curves_out_of_sight_are_drawn_for_paper(tmp_path: Path) -> None:
    page = open_page([page_run(tmp_path / "one")], tmp_path / "out.html", "inSight = false;")
    drawn = "page.charts.filter((chart) => chart.plot.children.length).length"
    assert page.run(drawn) == 0
    page.run("window.fire('beforeprint')")
    assert page.run(drawn) == page.run("page.charts.length") > 5


def test_a_run_of_one_step(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run") as log:
        log.metrics({"kind": "train", "step": 1, "reward/raw_mean": 0.0, "policy/kl": 0.0})
    page = open_page([tmp_path / "run"], tmp_path / "out.html")
    assert page.run("tag('path').every((e) => !/NaN|Infinity/.test(e.attributes.d))")
    page.run("page.charts.forEach((chart) => { chart.log = true; chart.draw(); })")
    assert page.run("tag('path').every((e) => !/NaN|Infinity/.test(e.attributes.d))")
