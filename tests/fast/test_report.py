"""The report: what it reads from a run directory, and that nothing a model wrote can act in it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.long_run import write_run
from prorl_nemo.errors import UserError
from prorl_nemo.reporting import write_report
from prorl_nemo.reporting.run import (
    SAMPLE_STEPS,
    SAMPLES_PER_STEP,
    TEXT_LIMIT,
    Run,
    breaks,
    columns,
    compact,
    cosine_spans,
    pick_samples,
    read_run,
    setting_differences,
    spans,
    stages,
    summary,
)
from prorl_nemo.training.metrics import RunLog

HOSTILE = (
    '</script><script>document.title="broken out"</script><img src=x onerror=alert(1)>'
    "<!-- ]]> &lt; \u2028 \ud800 \x00 ${title} $data"
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "long", seed=1, crashes=(487, 1320, 2206))


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    out = run_dir / "report.html"
    write_report([run_dir], out)
    return out.read_text("utf-8")


class Elements(HTMLParser):
    """Counts elements and keeps the text of scripts, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def small_run(run_dir: Path, rows: list[dict[str, Any]], recipe: str = "model: m\n") -> Path:
    with RunLog(run_dir) as log:
        for row in rows:
            log.metrics({"kind": "train", "time": 1.0, **row})
    (run_dir / "recipe.yaml").write_text(recipe)
    return run_dir


def test_the_page_carries_the_run(page: str) -> None:
    run = Elements(page).data["runs"][0]
    assert run["train"]["step"] == list(range(1, 3001))
    assert run["validation"]["step"] == list(range(0, 3001, 50))
    assert run["train"]["policy/grad_norm"][699] is None
    assert run["resets"] == list(range(300, 3001, 300))
    assert run["restarts"] == [450, 1300, 2200]
    assert run["cosine"] == [[1 + 600 * k, 100 + 600 * k] for k in range(5)]
    assert [(s["from"], s["to"], s["name"], s["limit"]) for s in run["stages"]] == [
        (1, 1000, "warm up", 2048), (1001, 2200, "longer answers", 4096),
        (2201, 3000, "hard problems", 8192),
    ]  # fmt: skip
    threshold = run["train"]["reset/kl_threshold"]
    known = [value is not None for value in threshold[:301]]
    assert known == [100 < step < 300 for step in range(1, 302)]
    assert threshold[149] == pytest.approx(3 * 2e-5 * 150**0.9, rel=1e-4)  # kept to 5 digits
    assert "reset_decision" not in {event["event"] for event in run["events"]}
    assert run["breaks"] == sorted({*range(301, 3002, 300), 1001, 2201})
    assert run["recipe"].startswith("name: long\nseed: 1\n")
    # 3,000 steps of some forty numbers: about a megabyte, fit to be mailed.
    assert len(page) < 2_000_000


def test_the_summary_counts_what_the_rows_say(run_dir: Path) -> None:
    found = summary(read_run(run_dir))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    validation = [row for row in rows if row["kind"] == "validation"]
    assert len(train) == 3000
    seconds = math.fsum(r["time/step"] for r in train) + 20.0 * len(validation)
    # Sums of 3,000 doubles differ in the order of summation only.
    assert found["seconds"] == pytest.approx(seconds, rel=1e-12)
    assert found["generated_tokens"] == sum(r["rollout/generated_tokens"] for r in train)
    best = max(r["validation/mean"] for r in validation)
    assert found["validation"]["best"]["mean"] == best
    assert found["validation"]["start"]["step"] == 0
    assert found["validation"]["last"]["step"] == 3000
    assert found["validation"]["count"] == len(validation) == 61
    assert (found["state"], found["steps"], found["total_steps"]) == ("finished", 3000, 3000)
    assert (found["resets"], found["restarts"], found["stages"]) == (10, 3, 3)
    assert (found["skipped_updates"], found["model"]) == (1, "smollm2-135m-instruct")


def test_gain_and_its_error_by_hand(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step, mean, error in [(0, 0.25, 0.03), (10, 0.75, 0.05), (20, 0.5, 0.04)]:
            log.metrics({"kind": "validation", "step": step, "time/validate": 2.0,
                         "validation/mean": mean, "validation/stderr": error})  # fmt: skip
    found = summary(read_run(tmp_path))["validation"]
    assert found["gain"] == 0.25
    assert found["gain_stderr"] == pytest.approx(0.05, rel=1e-12)  # 3-4-5 triangle
    assert found["best"] == {"step": 10, "mean": 0.75, "stderr": 0.05}


@pytest.mark.parametrize(
    ("events", "state"),
    [([], "unknown"), (["run_started"], "running"), (["run_started", "stopped"], "stopped"),
     (["run_started", "stopped", "resumed"], "running"), (["resumed", "finished"], "finished")],
)  # fmt: skip
def test_state_is_what_happened_last(tmp_path: Path, events: list[str], state: str) -> None:
    small_run(tmp_path, [{"step": 1}])
    with RunLog(tmp_path) as log:
        for event in events:
            log.event(event, 1, reason="Ctrl-C")
        log.event("checkpoint_saved", 1)
    assert summary(read_run(tmp_path))["state"] == state


def test_a_step_done_again_shows_its_last_row(tmp_path: Path) -> None:
    small_run(tmp_path, [{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 1, "a": 3}])
    assert columns(read_run(tmp_path).train)["a"] == [3, 2]


def test_nothing_a_model_wrote_leaves_its_place(tmp_path: Path) -> None:
    """Hostile text everywhere: samples, events, recipe, task and run names."""
    run_dir = tmp_path / "<img src=x onerror=alert(1)>&amp;"
    small_run(run_dir, [{"step": 1, "reward/raw_mean": 0.5, f"reward/raw/{HOSTILE}": 1.0}],
              f"model: {json.dumps(HOSTILE)}\n")  # fmt: skip
    with RunLog(run_dir) as log:
        log.event("prompt_dropped", 1, prompt_id=HOSTILE, figures={"x": math.inf})
        log.samples(1, [{
            "step": 1, "task": HOSTILE, "prompt_id": HOSTILE, "response": HOSTILE,
            "messages": [{"role": HOSTILE, "content": HOSTILE}], "reason": HOSTILE, "score": 1.0,
            "finish_reason": HOSTILE,
        }])  # fmt: skip
    out = tmp_path / "out.html"
    write_report([run_dir], out)
    text = out.read_text("utf-8")
    elements = Elements(text)
    assert [tag for tag, _ in elements.tags if tag in ("script", "img", "iframe", "link")] == [
        "script", "script",
    ]  # fmt: skip
    assert not any(key.startswith("on") for _, attrs in elements.tags for key in attrs)
    # The browser's own rule: a script element ends at the first `</script`, whatever it holds.
    assert text.lower().count("</script") == 2
    assert "<!--" not in text
    run = elements.data["runs"][0]
    sample = run["samples"][0]
    assert sample["response"] == HOSTILE
    assert sample["turns"] == [[HOSTILE, HOSTILE]]
    assert run["events"][0]["details"] == {"prompt_id": HOSTILE, "figures": {"x": None}}
    assert run["summary"]["model"] == HOSTILE


def test_the_page_needs_no_network_and_admits_no_other_script(page: str) -> None:
    elements = Elements(page)
    policy = next(
        attrs["content"] or ""
        for tag, attrs in elements.tags
        if tag == "meta" and "http-equiv" in attrs
    )
    digest = base64.b64encode(hashlib.sha256(elements.scripts[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy
    assert not any(key in attrs for _, attrs in elements.tags for key in ("src", "href", "style"))
    urls = set(re.findall(r"https?://[^\s\"']+", elements.scripts[1] + page.split("<script")[0]))
    assert urls == {"http://www.w3.org/2000/svg"}  # a name space, never fetched


def test_several_runs_and_the_settings_they_differ_in(tmp_path: Path) -> None:
    recipes = [
        "model: m\nrollout: {temperature: 1.2}\nstages: [{steps: 2}]\n",
        "model: m\nrollout: {temperature: 0.8}\nstages: [{steps: 2}, {steps: 3}]\n",
    ]
    dirs = [small_run(tmp_path / str(i) / "same", [{"step": 1, "a": i}], recipe)
            for i, recipe in enumerate(recipes)]  # fmt: skip
    out = tmp_path / "deep" / "out.html"
    write_report(dirs, out)
    data = Elements(out.read_text()).data
    assert [run["name"] for run in data["runs"]] == ["same (1)", "same (2)"]
    assert data["differences"] == [
        ["rollout.temperature", ["1.2", "0.8"]],
        ["stages.1.steps", ["-", "3"]],
    ]
    with pytest.raises(UserError, match="named twice"):
        write_report([dirs[0], dirs[0]], out)
    with pytest.raises(UserError, match="at least one"):
        write_report([], out)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="no rows yet"):
        read_run(tmp_path)


@pytest.mark.parametrize("recipe", ["", "[1, 2", "- a\n- b\n", "stages: 3\nmodel: [1]\n",
                                    "stages: [{steps: x}, 4]\n", "a: &a [*a]\n"])  # fmt: skip
def test_a_run_with_a_broken_recipe_is_still_shown(tmp_path: Path, recipe: str) -> None:
    small_run(tmp_path / "run", [{"step": 1, "a": 1}], recipe)
    write_report([tmp_path / "run"], tmp_path / "out.html")
    assert Elements((tmp_path / "out.html").read_text()).data["runs"][0]["summary"]["steps"] == 1


def test_yaml_that_stands_for_more_than_memory_holds(tmp_path: Path) -> None:
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 12))
    dirs = [small_run(tmp_path / name, [{"step": 1, "a": 1}], f"l0: &l0 [{name}]\n{levels}")
            for name in ("x", "y")]  # fmt: skip
    differences = setting_differences([read_run(d) for d in dirs])
    assert differences[0] == ("l0", ["['x']", "['y']"])


def test_rows_of_any_shape_make_a_page(tmp_path: Path) -> None:
    odd: list[dict[str, Any]] = [
        {},
        {"step": 2, "stage": "x", "time/step": "y", "reward/raw_mean": [1]},
        {"step": 3, "shaping/cosine_on": None, "stage": None, "big": 10**400},
    ]
    small_run(tmp_path / "run", [{"step": 1}])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        for row in odd:
            file.write(json.dumps({"kind": "train", **row}) + "\n")
    (tmp_path / "run" / "events.jsonl").write_text(
        '{"event":5}\n{"step":"x","event":"resumed"}\n{}\n'
    )
    samples = tmp_path / "run" / "samples"
    samples.mkdir()
    (samples / "step_000001.jsonl").write_text('{"messages":[3,{}],"score":"x","response":null}\n')
    write_report([tmp_path / "run"], tmp_path / "out.html")
    assert Elements((tmp_path / "out.html").read_text()).data["runs"][0]["summary"]["steps"] == 3


def test_samples_are_even_over_steps_and_varied_within(run_dir: Path) -> None:
    picked = pick_samples(run_dir)
    steps = sorted({sample["step"] for sample in picked})
    assert len(steps) == SAMPLE_STEPS
    assert steps[0] == 50
    assert steps[-1] == 3000
    gaps = {b - a for a, b in pairwise(steps)}
    assert gaps <= {50, 100}  # 60 files, 40 shown: one or two files on
    for step in steps:
        own = [sample for sample in picked if sample["step"] == step]
        assert len(own) == SAMPLES_PER_STEP
        rows = (run_dir / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()
        kinds = {(r["task"], r["score"], r["finish_reason"]) for r in map(json.loads, rows)}
        shown = {(s["task"], s["score"], s["finish"]) for s in own}
        assert len(shown) == min(len(kinds), SAMPLES_PER_STEP)


def test_long_texts_lose_their_middle(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.samples(1, [{"response": "a" * 20_000 + "z" * 20_000}, {"response": "b" * TEXT_LIMIT}])
    long, whole = (sample["response"] for sample in pick_samples(tmp_path))
    assert long.startswith("a" * 4500 + "\n\n[… 31,000 characters left out …]\n\nz")
    assert len(long) < TEXT_LIMIT + 60
    assert whole == "b" * TEXT_LIMIT


def test_spans_by_hand() -> None:
    assert spans([1, 2, 3, 7], ["a", "a", "b", "b"]) == [(1, 2, "a"), (3, 7, "b")]
    assert spans([], []) == []


@settings(deadline=None)
@given(values=st.lists(st.booleans(), max_size=50))
def test_spans_against_a_slow_reference(values: list[bool]) -> None:
    rebuilt = {}
    found = spans(range(len(values)), values)
    for first, last, value in found:
        rebuilt.update(dict.fromkeys(range(first, last + 1), value))
    assert [rebuilt[i] for i in range(len(values))] == values
    assert all(a[2] != b[2] for a, b in pairwise(found))


@pytest.mark.parametrize(
    ("value", "short"),
    [(0.123456789, 0.12346), (2e-6, 2e-6), (8192, 8192), (123456789, 123456789), (3.0, 3),
     (1234567.0, 1234600), (None, None), (True, None), ("1", None), (math.nan, None),
     (math.inf, None), (10**400, None)],
)  # fmt: skip
def test_numbers_as_a_page_carries_them(value: Any, short: float | None) -> None:
    assert compact(value) == short


def test_stages_and_penalty_of_a_run_without_them() -> None:
    run = Run("r", "", {}, [{"step": 1}, {"step": 2}], [], [], [])
    assert stages(run) == []
    assert cosine_spans(run) == []
    assert breaks(run) == []
