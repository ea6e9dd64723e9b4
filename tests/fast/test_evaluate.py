"""`prorl eval` against a small server: killed, resumed, graded again, compared, shown.

The same loop, files and figures serve the training fleet (tests/slow/test_eval.py).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import Server, chance, serving
from rich.console import Console
from typer.testing import CliRunner

from prorl_nemo.cli import app
from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.estimators import average
from prorl_nemo.evaluation.suite import Changes
from prorl_nemo.harness.again import compare, regrade
from prorl_nemo.harness.evaluate import Request, evaluate
from prorl_nemo.strict_yaml import dump_yaml

ITEMS, SAMPLES = 12, 4
SUMS: dict[str, Any] = {
    "name": "sums",
    "title": "Sums",
    "domain": "math",
    "data": {
        "origin": "git",
        "name": "ours/sums",
        "revision": "1",
        "files": ["sums.jsonl"],
        "reader": "math",
        "licence": "none",
        "items": ITEMS,
        "sha256": None,
    },
    "system": "Be brief.",
    "prompt": "{problem}\nBox it.",
    "extraction": "last_box",
    "grader": "math",
    "metric": "strict",
    "samples": SAMPLES,
    "sampling": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 64},
    "source": "ours",
}
PROTOCOL = {
    "name": "plain",
    "title": "Plain",
    "sampling": {"temperature": 0.7, "top_p": 0.9, "max_tokens": 64},
    "samples": SAMPLES,
    "source": "ours",
}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Definitions and data."""
    folder = tmp_path_factory.mktemp("definitions")
    for kind in ("benchmarks", "protocols", "reported", "data"):
        (folder / kind).mkdir()
    (folder / "benchmarks" / "sums.yaml").write_text(dump_yaml(SUMS))
    (folder / "protocols" / "plain.yaml").write_text(dump_yaml(PROTOCOL))
    fewer = {**PROTOCOL, "name": "fewer", "samples": 2, "items": 5}
    (folder / "protocols" / "fewer.yaml").write_text(dump_yaml(fewer))
    other = {**PROTOCOL, "name": "other", "sampling": {**SUMS["sampling"], "top_p": 0.5}}
    (folder / "protocols" / "other.yaml").write_text(dump_yaml(other))
    rows = [{"problem": f"{i} + {i * i} = ?", "answer": str(i + i * i)} for i in range(ITEMS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / "sums.jsonl").write_text(lines)
    (folder / "reported" / "table.csv").write_text(
        "model,benchmark,value,metric,protocol,source,doubt\n"
        "small,sums,50.0,avg@4,plain,a paper,\n"
        "large,sums,90.0,avg@4,plain,a paper,\n"
    )
    return folder


def answer(body: dict[str, Any]) -> str:
    """Right half of the time, else wrong, without a box, or too long."""
    turn = chance(body, 8)
    a, b = (int(n) for n in re.findall(r"\d+", body["messages"][-1]["content"])[:2])
    if turn < 4:
        return rf"It is \boxed{{{a + b}}}."
    return {4: rf"\boxed{{{a + b + 1}}}", 5: rf"\boxed{{{a}}}", 6: "No idea."}.get(turn, "x" * 64)


def request(server: Server, folder: Path, out: Path, **more: Any) -> Request:
    settings = {"protocol": "plain", "concurrency": 4, "workers": 1, **more}
    return Request(server.url, data_dir=folder / "data", out=out, definitions=folder, **settings)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "samples.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda r: (r["item"], r["sample"]))


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An evaluation that nothing disturbed."""
    out = tmp_path_factory.mktemp("done") / "out"
    with serving(answer) as server:
        outcome = evaluate(request(server, folder, out, reported_as="small"), QUIET)
        assert len(server.asked) == ITEMS * SAMPLES
    assert outcome.results is not None
    yield out


def test_every_sample_is_kept_whole(done: Path) -> None:
    found = rows(done)
    assert len({(row["item"], row["sample"]) for row in found}) == ITEMS * SAMPLES == len(found)
    assert len({row["seed"] for row in found}) == len(found)
    for row in found:
        assert json.loads(row["prompt"])[0]["content"] == "Be brief."
        assert row["tokens"] == len(row["response"])
        assert row["truncated"] == (len(row["response"]) > 60)
        box = re.search(r"boxed\{(\d+)\}", row["response"])
        assert row["answer"] == (box and box[1])
        a, b = (int(n) for n in re.findall(r"\d+", json.loads(row["prompt"])[-1]["content"])[:2])
        right = box is not None and int(box[1]) == a + b
        assert row["score"] == right
        assert row["verdict"] == ("right" if right else "wrong" if box else "no_answer")
        assert row["reason"]
    assert not (done / "generated.jsonl").exists()


def test_figures_are_those_of_the_samples(done: Path) -> None:
    (result,) = json.loads((done / "results.json").read_text())["benchmarks"]
    by_item: dict[str, list[float]] = {}
    for row in rows(done):
        by_item.setdefault(row["item"], []).append(row["score"])
    ours = average(list(by_item.values()))
    assert result["average"]["mean"] == ours.mean
    assert result["average"]["error_samples"] == ours.error_samples
    assert result["pass_curve"][0] == pytest.approx(ours.mean)
    assert result["pass_curve"][-1] == sum(max(v) for v in by_item.values()) / ITEMS
    assert set(result["votes"]) == {"1", "2", "4"}
    truncated = [row["truncated"] for row in rows(done)]
    assert result["shares"]["truncated"] == sum(truncated) / len(truncated)
    (beside,) = result["comparisons"]
    assert beside["reported"]["model"] == "small"
    assert beside["mismatches"] == []
    assert beside["difference"] == pytest.approx(100 * ours.mean - 50)
    page = (done / "results.md").read_text()
    assert "| sums | avg@4 | 12 |" in page
    assert "cannot be pinned" in page


def test_killed_at_any_moment_it_ends_the_same(folder: Path, done: Path, tmp_path: Path) -> None:
    """SIGKILL twice; nothing is generated twice but what was under way, nothing counted twice."""
    out = tmp_path / "out"
    with serving(answer, seconds=0.15) as server:
        arguments = [server.url, "--protocol", "plain", "--definitions", folder, "--out", out,
                     "--data-dir", folder / "data", "--concurrency", "3", "--workers", "1",
                     "--reported-as", "small"]  # fmt: skip
        command = [sys.executable, "-m", "prorl_nemo.cli", "eval", *map(str, arguments)]
        samples = out / "samples.jsonl"
        for killed_at in (8, 24):
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
            )
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None:
                if samples.exists() and samples.read_bytes().count(b"\n") >= killed_at:
                    break
                time.sleep(0.01)
            assert process.poll() is None, process.communicate()[0]
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            # What a kill in the middle of a write leaves.
            with samples.open("ab") as file:
                file.write(b'{"item":"sums/torn","sam')
        kept = [row for row in rows_of(samples) if row is not None]
        server.seconds = 0.0
        outcome = evaluate(request(server, folder, out, reported_as="small"), QUIET)
        asked = len(server.asked)
    assert outcome.results is not None
    # Three were under way at each kill.
    assert ITEMS * SAMPLES <= asked <= ITEMS * SAMPLES + 2 * 3
    assert outcome.times.samples <= ITEMS * SAMPLES - len(kept)
    ours, undisturbed = rows(out), rows(done)
    assert ours == undisturbed
    # The port of the server is in the manifest, so only the figures are the same.
    figures = [json.loads((f / "results.json").read_text())["benchmarks"] for f in (out, done)]
    assert figures[0] == figures[1]


def rows_of(path: Path) -> list[dict[str, Any] | None]:
    found: list[dict[str, Any] | None] = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            found.append(None)
    return found


def test_another_evaluation_does_not_go_on_in_its_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(answer) as server:
        evaluate(request(server, folder, out), QUIET)
        asked = len(server.asked)
        for more, part in (
            ({"seed": 1}, "seed: 0 there, 1 now"),
            ({"protocol": "fewer"}, "protocol.label: 'plain' there, 'fewer' now"),
            ({"changes": Changes(max_tokens=9)}, "protocol.sampling.max_tokens: 64 there, 9 now"),
            ({"served_model": "big"}, "model.generator.served: 'small' there, 'big' now"),
        ):
            with pytest.raises(UserError, match=re.escape(part)):
                evaluate(request(server, folder, out, **more), QUIET)
        data = tmp_path / "data"
        data.mkdir()
        text = (folder / "data" / "sums.jsonl").read_text().replace("2 + 4", "2 + 5")
        (data / "sums.jsonl").write_text(text)
        with pytest.raises(UserError, match="items_sha256"):
            evaluate(
                Request(server.url, "plain", data_dir=data, out=out, definitions=folder), QUIET
            )
        assert len(server.asked) == asked
        # The same one again asks nothing and changes nothing.
        before = (out / "samples.jsonl").read_bytes()
        evaluate(request(server, folder, out), QUIET)
        assert len(server.asked) == asked
        assert (out / "samples.jsonl").read_bytes() == before


def test_samples_depend_on_neither_order_nor_concurrency(
    folder: Path, done: Path, tmp_path: Path
) -> None:
    turned = tmp_path / "data"
    turned.mkdir()
    lines = (folder / "data" / "sums.jsonl").read_text().splitlines(keepends=True)
    (turned / "sums.jsonl").write_text("".join(reversed(lines)))
    out = tmp_path / "out"
    with serving(answer) as server:
        evaluate(
            Request(
                server.url, "plain", data_dir=turned, out=out, definitions=folder, concurrency=1,
                workers=2, reported_as="small",
            ),
            QUIET,
        )  # fmt: skip
    assert rows(out) == rows(done)


def test_graded_again_it_is_the_same(folder: Path, done: Path) -> None:
    before = (done / "samples.jsonl").read_bytes(), (done / "results.json").read_bytes()
    results, changed = regrade(done, definitions=folder, reported_as="small")
    assert changed == 0
    assert ((done / "samples.jsonl").read_bytes(), (done / "results.json").read_bytes()) == before
    # A verdict that was tampered with comes right, and is counted.
    tampered = before[0].replace(b'"score":1.0', b'"score":0.0', 1)
    (done / "samples.jsonl").write_bytes(tampered)
    assert regrade(done, definitions=folder, reported_as="small")[1] == 1
    assert (done / "samples.jsonl").read_bytes() == before[0]
    assert results[0].average.items == ITEMS


def test_one_generation_serves_another_protocol(folder: Path, done: Path) -> None:
    (result,), _ = regrade(done, protocol="fewer", definitions=folder, reported_as="small")
    assert (result.average.items, result.average.samples) == (5, 2)
    items = sorted({row["item"] for row in rows(done)})[:5]
    scores = [r["score"] for r in rows(done) if r["item"] in items and r["sample"] < 2]
    assert result.average.mean == sum(scores) / 10
    assert (done / "results.fewer.json").exists()
    with pytest.raises(UserError, match="samples otherwise"):
        regrade(done, protocol="other", definitions=folder)


def test_two_models_are_compared_on_the_same_items(
    folder: Path, done: Path, tmp_path: Path
) -> None:
    out = tmp_path / "better"
    with serving(
        lambda body: answer({**body, "seed": 0}) if chance(body, 3) else answer(body)
    ) as s:
        evaluate(request(s, folder, out, reported_as="large"), QUIET)
    (found,), unlike, names = compare(out, done)
    by_item: dict[str, list[float]] = {}
    for sign, where in ((1, out), (-1, done)):
        for row in rows(where):
            by_item.setdefault(row["item"], []).append(sign * row["score"] / SAMPLES)
    assert found.paired.difference == pytest.approx(sum(map(sum, by_item.values())) / ITEMS)
    assert found.paired.items == ITEMS
    assert unlike == []
    manifest = json.loads((out / "evaluation.json").read_text())
    manifest["model"]["generator"]["precision"] = "bf16"
    (out / "evaluation.json").write_text(json.dumps(manifest | {"seed": 3}))
    assert compare(out, done)[1] == [
        "generator.precision: 'bf16' there, None now",
        "seed: 3 there, 0 now",
    ]
    assert names[0] != names[1]
    shown = CliRunner().invoke(app, ["eval", "--compare", str(out), str(done)])
    assert shown.exit_code == 0, shown.output


def test_a_server_that_fails_loses_nothing_and_no_key(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    out = tmp_path / "out"
    with serving(answer) as server:
        # 400 is not tried again.
        server.refuse = 400
        with pytest.raises(UserError, match="the same command goes on") as caught:
            evaluate(request(server, folder, out), QUIET)
        assert "sk-very-secret" not in str(caught.value)
        server.refuse = 0
        assert evaluate(request(server, folder, out), QUIET).results is not None
    for path in out.iterdir():
        assert b"sk-very-secret" not in path.read_bytes()
    with pytest.raises(UserError, match="cannot be reached"):
        evaluate(request(server, folder, tmp_path / "none"), QUIET)


def test_a_server_s_thoughts_are_no_answer(folder: Path, tmp_path: Path) -> None:
    """A thought that is cut off holds a box, and answers nothing."""
    out = tmp_path / "out"
    with serving(lambda body: "<think> maybe \\boxed{1}, or " + "so " * 20) as server:
        (result,) = evaluate(request(server, folder, out), QUIET).results or []
    assert result.shares.no_answer == result.shares.truncated == 1.0


def test_hostile_text_is_only_text(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evil = "</script><script>alert(1)</script> | `x` \x1b[2J \ud83d \u2028 \\boxed{<b>|2}"
    with serving(lambda body: evil) as server:
        evaluate(request(server, folder, out), QUIET)
    page = (out / "results.html").read_text()
    assert "<script>alert" not in page
    assert page.count("<script") == 2
    assert len(rows(out)) == ITEMS * SAMPLES


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "give a MODEL"),
        (["m", "--regrade", "d"], "give a MODEL"),
        (["--regrade", "none"], "no folder of an evaluation"),
        (["no/such/folder"], "there is no folder"),
        (["tiny-arithmetic", "--protocol", "none"], "there is no protocol 'none'"),
        (["tiny-arithmetic", "--benchmarks", "x"], "there is no benchmark 'x'"),
        (["tiny-arithmetic", "--step", "3"], "a model has no steps"),
        (["tiny-arithmetic", "--sandbox", "none"], "--allow-unsafe"),
        (["tiny-arithmetic", "--precision", "int8"], "--precision"),
        (["tiny-arithmetic", "--beside", "x"], "no table has 'x'"),
        (["tiny-arithmetic", "--temperature", "0"], "greedy decoding"),
        (["tiny-arithmetic", "--max-tokens", "4000"], "--max-tokens"),
    ],
)
def test_mistakes_are_told_before_engines_start(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["--definitions", folder, "--data-dir", folder / "data", "--out", tmp_path / "out"]
    if "--protocol" not in arguments:
        more += ["--protocol", "plain"]
    result = CliRunner().invoke(app, ["eval", *arguments, *map(str, more)])
    assert result.exit_code == 2, result.output
    assert part in result.stderr
    assert not (tmp_path / "none").exists()
