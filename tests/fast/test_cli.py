"""The command as people meet it: a mistake gives one message naming key and fix, status 2, soon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from typer.testing import CliRunner, Result

from prorl_nemo import folder_lock
from prorl_nemo.cli import app
from prorl_nemo.recipe import load_recipe
from prorl_nemo.strict_yaml import dump_yaml
from prorl_nemo.tiny_model import tiny_model
from prorl_nemo.training import preflight, run
from prorl_nemo.training.run_dir import open_run_dir

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen2", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    raw: dict[str, Any] = {
        "name": "small",
        "runs_dir": str(tmp_path / "runs"),
        "model": str(model),
        "data": {"sources": [{"task": "coin_flip"}], "max_prompt_tokens": 64},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_response_tokens": 8},
        "stages": [{"steps": 1}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(raw))
    return path


@pytest.fixture
def prorl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`prorl ...` in this process. A worker that is started fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("workers were started")

    monkeypatch.setattr(run, "open_session", refuse)

    def invoke(*arguments: str | Path) -> Result:
        began = time.process_time()  # Other work on the machine does not count.
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert time.process_time() - began < 5
        return result

    yield invoke
    assert not ray.is_initialized()


def refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error ")
    assert result.stderr.count("error ") == 1
    assert "Traceback" not in result.output
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.temprature=1", ["rollout.temprature: unknown key; did you mean temperature?"]),
        ("rollout.temperature=hot", ["rollout.temperature: must be a number (found 'hot')"]),
        ("rollout.temperature=0", ["rollout.temperature: must be greater than 0 (found 0)"]),
        ("rollout.temperature", ["write it as section.key=value"]),
        ("stages.1.steps=2", ["stages.1.steps=2", "the list has entries 0 to 0"]),
        ("policy.tensor_parallel=3", ["policy.tensor_parallel: 3 does not divide", "possible: 1"]),
        ("policy.pipeline_parallel=5", ["policy.pipeline_parallel: 5 does not divide"]),
        ("policy.fp8=delayed", ["policy.fp8: ", "remove the key"]),
        ("data.max_prompt_tokens=9999", ["data.max_prompt_tokens", "positions; lower one"]),
        ("model=no/such/folder", ["model: there is no folder 'no/such/folder'"]),
        ("model=/dev/null", ["model: /dev/null is not a folder"]),
    ],
)
def test_a_wrong_setting(
    prorl: Run, recipe: Path, command: str, override: str, parts: list[str]
) -> None:
    refused(prorl(command, recipe, override), *parts)
    assert not (recipe.parent / "runs").exists()


def test_a_damaged_model(prorl: Run, recipe: Path, tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "damaged", layers=1)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    result = prorl("train", recipe, f"model={folder}")
    refused(result, f"{weights}: truncated or damaged", "copy it again")
    weights.unlink()
    refused(prorl("train", recipe, f"model={folder}"), "has no model.safetensors")


def test_too_little_memory(prorl: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_bytes", lambda: 1 << 30)
    monkeypatch.setattr(preflight, "gpu_present", lambda: False)
    refused(prorl("train", recipe), "model: about", "1.0 GiB are free", "smaller model")


def test_an_unwritable_run_directory(prorl: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = prorl("train", recipe, f"runs_dir={tmp_path / 'file' / 'runs'}")
    refused(result, "runs_dir: ", "cannot be written", "runs_dir=DIR")


def test_a_run_directory_of_another_recipe_or_in_use(
    prorl: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 0.5)
    settings = load_recipe(recipe)
    with open_run_dir(settings):
        result = prorl("train", recipe)
        assert result.exit_code == 2 and result.stdout == ""
        wait, refusal = result.stderr.split("\n", 1)
        assert "is in use by process" in wait and "waiting up to 0.5 s for its end" in wait
        assert refusal.startswith("error ") and "name=NAME" in refusal
        (settings.run_dir / "metrics.jsonl").write_text('{"kind": "validation", "step": 0}\n')
    result = prorl("train", recipe, "seed=7")
    refused(result, "was begun with another recipe", "name=NAME", "seed: 1 there, 7 now")


def test_files_that_are_no_recipe(prorl: Run, tmp_path: Path) -> None:
    refused(prorl("train", tmp_path), f"{tmp_path}: is a folder")
    refused(prorl("train", tmp_path / "absent.yaml"), "there is no such file")
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\nname: b\n")
    refused(prorl("check", path), "line 2, column 1: the key 'name' is given twice")


def test_what_a_message_quotes_does_not_steer_the_terminal(prorl: Run, tmp_path: Path) -> None:
    result = prorl("train", tmp_path / "a\x1b[31m [bold] b.yaml")
    refused(result, "a\\x1b[31m [bold] b.yaml: there is no such file")


def test_a_place_for_the_output_is_looked_at_first(prorl: Run, recipe: Path) -> None:
    refused(prorl("check", recipe, "--json", recipe / "x.json"), "--json: ", "cannot be written")


def test_a_check_of_nodes_is_nothing_else(prorl: Run, recipe: Path, tmp_path: Path) -> None:
    for option in (["--tiny"], ["--json", tmp_path / "lines.json"]):
        refused(prorl("check", recipe, "--cluster", *option), "--cluster: ", "leave out --tiny")
    assert not (tmp_path / "lines.json").exists()


def test_report_of_nothing(prorl: Run, tmp_path: Path) -> None:
    refused(prorl("report", tmp_path / "absent"), "absent: not a run directory")
    row = '{"kind": "validation", "step": 0, "time": 1.0, "validation/mean": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(row)
    result = prorl("report", tmp_path, "--out", tmp_path / "metrics.jsonl" / "x.html")
    refused(result, "--out: ", "cannot be written")


def test_grading_a_file(prorl: Run, tmp_path: Path) -> None:
    refused(prorl("grade", tmp_path / "absent.jsonl"), "absent.jsonl: No such file")
    file = tmp_path / "responses.jsonl"
    record = '{"grading": {"kind": "multiple_choice", "answer": "B"}, "response": "\\\\boxed{%s}"}'
    file.write_text(record % "B" + "\n" + record % "A" + "\n")
    result = prorl("grade", file, "--workers", "1")
    assert result.exit_code == 0
    assert "0.5000" in result.stdout  # One of two is right.
    file.write_text(file.read_text() + "{\n")
    result = prorl("grade", file, "--workers", "1")
    assert result.exit_code == 1
    assert "line 3: not JSON" in result.stdout


def test_a_bug_keeps_its_traceback(prorl: Run, recipe: Path) -> None:
    result = prorl("train", recipe)  # All is well, so it goes on to the refused session.
    assert isinstance(result.exception, AssertionError)
    assert result.exit_code == 1


@pytest.mark.parametrize("arguments", [[], ["trian", "x.yaml"], ["train"], ["train", "--fast"]])
def test_usage(prorl: Run, arguments: list[str]) -> None:
    result = prorl(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.output


def test_every_command_says_what_it_does(prorl: Run) -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__
        assert prorl(command.name or command.callback.__name__, "--help").exit_code == 0


def test_as_a_process(recipe: Path) -> None:
    """The installed command: exit status, a message that no terminal width cuts, no stdout."""
    environment = os.environ | {"COLUMNS": "40", "LC_ALL": "C", "NO_COLOR": "1"}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("prorl")), "train", str(recipe), "name=größe"],
        capture_output=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    lines = done.stderr.decode().splitlines()
    assert lines[0] == f"error {recipe}:"
    assert lines[1].startswith("  name: must match pattern")
    assert len(lines) == 2


# --- data and graders -----------------------------------------------------------------------


def test_code_without_a_sandbox_only_on_demand(prorl: Run, recipe: Path, tmp_path: Path) -> None:
    refused(
        prorl("train", recipe, "grading.sandbox=none"), "grading: sandbox none", "allow_unsafe=true"
    )
    settings = load_recipe(recipe, ["grading.sandbox=none", "grading.allow_unsafe=true"])
    assert settings.grading.sandbox == "none"
    responses = tmp_path / "responses.jsonl"
    responses.write_text('{"grading": {"kind": "math", "answer": "7"}, "response": "\\\\boxed{7}"}')
    refused(prorl("grade", responses, "--sandbox", "none"), "--sandbox", "--allow-unsafe")
    graded = prorl("grade", responses, "--sandbox", "none", "--allow-unsafe")
    assert graded.exit_code == 0, graded.output


def test_data_build_says_what_it_built(prorl: Run, recipe: Path, tmp_path: Path) -> None:
    refused(prorl("data", "build", recipe), "data.build", "no such section")
    rows = [{"problem": f"What is {i} + 1?", "answer": i + 1} for i in range(30)]
    (tmp_path / "deepscaler.json").write_text(json.dumps(rows))
    sources = f"data.build.sources=[{{source: deepscaler, path: {tmp_path}}}]"
    folder = f"data.build.folder={tmp_path / 'built'}"
    built = prorl("data", "build", recipe, folder, sources)
    assert built.exit_code == 0, built.output
    assert "deepscaler" in built.stdout and "nothing is compared" in built.stdout
    assert json.loads((tmp_path / "built" / "manifest.json").read_text())["tasks"] == {
        "math": {"deepscaler": {"train": 27, "held_out": 3}}
    }
    refused(prorl("data", "build", recipe, folder, "data.build.sources=[]"), "data.build.sources")
