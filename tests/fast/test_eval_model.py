"""What `prorl eval MODEL` takes for a model, which step of a run, and what pins it."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_result import BENCHMARKS, PROTOCOLS, part

from prorl_nemo.errors import UserError
from prorl_nemo.evaluation.benchmark import Sampling
from prorl_nemo.evaluation.suite import Changes, Suite, changed, find_protocol, load_suite
from prorl_nemo.export import chosen_step
from prorl_nemo.harness.fleet_generator import EngineOptions, FleetGenerator
from prorl_nemo.harness.generator import CannotAsk, chat
from prorl_nemo.harness.model import find_model, folder_sha256
from prorl_nemo.harness.view import EvaluationView
from prorl_nemo.rollout.engine_settings import EngineSettings
from prorl_nemo.strict_yaml import dump_yaml
from prorl_nemo.tiny_model import tiny_model

EVAL = Path(__file__).parents[2] / "eval"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen2", tmp_path_factory.mktemp("models") / "tiny")


def run_dir(folder: Path, steps: list[int], best: int | None = None) -> Path:
    """A run as far as its checkpoints' names and states go."""
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step_{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"resets": {"best_step": best}}))
    return folder


def test_steps_of_a_run(tmp_path: Path) -> None:
    run = run_dir(tmp_path / "run", [5, 10, 20], best=10)
    assert [chosen_step(run, step) for step in (None, "last", "best", "5", 20)] == [
        20,
        20,
        10,
        5,
        20,
    ]
    for step, message in (
        ("7", "no checkpoint of step 7, but of 5, 10, 20"),
        ("x", "'x' is no step"),
    ):
        with pytest.raises(UserError, match=message):
            chosen_step(run, step)
    with pytest.raises(UserError, match="has not been validated"):
        chosen_step(run_dir(tmp_path / "other", [1]), "best")
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        chosen_step(run_dir(tmp_path / "gone", [1], best=3), "best")
    for step in ("last", "best"):
        with pytest.raises(UserError, match="no checkpoint yet"):
            chosen_step(tmp_path, step)
    (run / "checkpoints" / "step_000020" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"step_000020: damaged \(state\.json: cannot be read"):
        chosen_step(run, "best")


def test_a_recipe_stands_for_its_run(tmp_path: Path, model: Path) -> None:
    recipe: dict[str, Any] = {
        "name": "one", "runs_dir": str(tmp_path), "model": str(model), "stages": [{"steps": 1}],
        "data": {"sources": [{"task": "coin_flip"}]},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(recipe))
    with pytest.raises(UserError, match="its run has not begun"):
        find_model(str(path))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "recipe.yaml").write_text(dump_yaml(recipe))
    with pytest.raises(UserError, match="has no checkpoint yet"):
        find_model(str(path))


def test_a_model_is_pinned_by_all_that_decides_its_answers(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "model")
    found = find_model(str(folder))
    assert (found.name, found.folder, found.url) == ("model", folder, None)
    before = folder_sha256(folder)
    assert found.sha256 == before
    (folder / "prorl_export.json").write_text("{}")
    (folder / "README.md").write_text("about")
    assert folder_sha256(folder) == before
    seen = {before}
    for name in ("model.safetensors", "config.json", "chat_template.jinja", "tokenizer.json"):
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
        seen.add(folder_sha256(folder))
    assert len(seen) == 5
    server = find_model("https://host/v1/")
    assert (server.url, server.sha256) == ("https://host/v1", None)
    for name in ("https://host/v1", str(folder)):
        with pytest.raises(UserError, match="has no steps"):
            find_model(name, "3")


def test_the_prompt_is_what_the_model_reads(model: Path) -> None:
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=8)
    generator = FleetGenerator(model, sampling, EngineOptions(), lambda name, details: None)
    prompt = generator.render(chat("Be brief.", "1 + 1?"))
    assert prompt.text.count("<|im_start|>") == 3
    assert "Be brief." in prompt.text
    assert "1 + 1?" in prompt.text
    assert not prompt.thinking
    with pytest.raises(CannotAsk, match="control token"):
        generator.render(chat(None, "say <|im_end|>"))


def test_a_template_that_opens_a_thought_is_noticed(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "model")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().rstrip() + "{{ '<think>\\n' }}")
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=8)
    generator = FleetGenerator(folder, sampling, EngineOptions(), lambda name, details: None)
    assert generator.render(chat(None, "1 + 1?")).thinking


@pytest.mark.parametrize(
    ("gpus", "precision", "batch_invariant", "chosen"),
    [
        (0, None, True, "fp32"),
        (0, None, False, "fp32"),
        (0, "bf16", False, "bf16"),
        (8, None, True, "bf16"),
        (8, "fp32", True, "fp32"),
    ],
)
def test_the_precision_is_one_in_which_the_number_of_engines_changes_nothing(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    precision: str | None,
    batch_invariant: bool,
    chosen: str,
) -> None:
    monkeypatch.setattr(FleetGenerator, "_gpus", lambda self: gpus)
    options = EngineOptions(precision=precision, batch_invariant=batch_invariant)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=8)
    generator = FleetGenerator(model, sampling, options, lambda name, details: None)
    assert generator.settings() == {
        "kind": "fleet", "precision": chosen, "batch_invariant": batch_invariant,
    }  # fmt: skip


def test_engines_of_several_gpus_are_counted_recorded_or_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FleetGenerator, "_gpus", lambda self: 5)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=8)

    def generator(**options: int) -> FleetGenerator:
        return FleetGenerator(model, sampling, EngineOptions(**options), lambda name, details: None)

    assert generator(tensor_parallel=2).settings()["tensor_parallel"] == 2
    with pytest.raises(UserError, match="3 engines need 2 GPUs each; there are 5"):
        generator(tensor_parallel=2, engines=3).start(8)
    with pytest.raises(UserError, match=r"--tensor-parallel: vLLM cannot split 4 heads.*over 3"):
        generator(tensor_parallel=3).start(8)


def test_one_gpu_an_engine_needs_no_number_of_heads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some families give it another name, or in a nested config."""
    other = shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["num_attention_heads"], config["intermediate_size"]
    (other / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(FleetGenerator, "_gpus", lambda self: 5)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=8)
    options = EngineOptions(engines=6)
    generator = FleetGenerator(other, sampling, options, lambda name, details: None)
    with pytest.raises(UserError, match="6 engines need a GPU each; there are 5"):
        generator.start(8)


def test_bf16_on_cpu_is_refused_unless_its_dependence_is_accepted(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FleetGenerator, "_gpus", lambda self: 0)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=8)
    options = EngineOptions(precision="bf16")
    generator = FleetGenerator(model, sampling, options, lambda name, details: None)
    with pytest.raises(UserError, match="--no-batch-invariant"):
        generator.settings()


def test_batch_invariant_kernels_are_asked_for_where_they_are_wanted() -> None:
    """In the environment, as vLLM reads it when it is imported."""
    plain = EngineSettings("model", "bfloat16", 64)
    assert "VLLM_BATCH_INVARIANT" not in plain.environment()
    assert replace(plain, batch_invariant=True).environment()["VLLM_BATCH_INVARIANT"] == "1"


def test_the_workers_of_an_engine_share_its_threads() -> None:
    four = EngineSettings("model", "bfloat16", 64, threads=4)
    assert four.environment()["OMP_NUM_THREADS"] == "4"
    split = {n: replace(four, tensor_parallel=n).environment() for n in (2, 8)}
    assert {n: found["OMP_NUM_THREADS"] for n, found in split.items()} == {2: "2", 8: "1"}
    assert split[2]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_what_a_command_changes_is_in_the_label() -> None:
    prorl = PROTOCOLS["prorl"]
    assert changed(prorl, Changes())[1] == "prorl"
    same, label = changed(prorl, Changes(samples=4, items=9, temperature=0.6))
    assert (label, same.samples, same.items, same.samples_of(BENCHMARKS["aime24"])) == (
        "prorl", 4, 9, 4,
    )  # fmt: skip
    other, label = changed(prorl, Changes(max_tokens=4096, top_p=0.9))
    assert label == "prorl (top_p 0.9, max_tokens 4096)"
    assert (other.sampling.max_tokens, other.sampling.top_p) == (4096, 0.9)
    justrl, _ = changed(PROTOCOLS["justrl"], Changes(samples=2))
    assert justrl.samples_of(BENCHMARKS["math500"]) == 2
    with pytest.raises(UserError, match="greedy"):
        changed(prorl, Changes(temperature=0.0))
    greedy, _ = changed(prorl, Changes(temperature=0.0, samples=1))
    assert greedy.sampling.temperature == 0


def test_a_protocol_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(dump_yaml({**PROTOCOLS["prorl"].model_dump(mode="json"), "name": "mine"}))
    assert find_protocol(EVAL, str(path)).name == "mine"
    path.write_text("name: mine\nsampels: 3\n")
    with pytest.raises(UserError, match="sampels"):
        find_protocol(EVAL, str(path))
    # A name that nothing has would leave the benchmark that was meant at 16 samples.
    raw = PROTOCOLS["prorl"].model_dump(mode="json") | {"samples_for": {"math_500": 4}}
    path.write_text(dump_yaml(raw))
    with pytest.raises(UserError, match="no benchmark 'math_500'"):
        find_protocol(EVAL, str(path))
    with pytest.raises(UserError, match="says nothing about gsm8k"):
        load_suite(EVAL, "justrl", ["gsm8k"])
    with pytest.raises(UserError, match="named twice"):
        load_suite(EVAL, "prorl", ["humaneval", "humaneval"])


def test_the_live_table_shows_how_far_it_is() -> None:
    suite = Suite(PROTOCOLS["prorl"], "prorl", 0, [part(BENCHMARKS["gsm8k"], ["gsm8k"] * 4, 2)])
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    row = {"benchmark": "gsm8k", "verdict": "right", "truncated": False, "tokens": 10, "score": 1.0}
    with EvaluationView(suite, "a model", console) as view:
        view.phase("engines")
        view.phase("")
        view.sample({**row, "item": "a"})
        view.sample({**row, "item": "b", "score": 0.0, "verdict": "no_answer", "truncated": True})
        view.progress(20, 3, 1)
    shown = screen.getvalue()
    for wanted in ("a model", "gsm8k", "50.0", "50%"):
        assert wanted in shown
    plain = io.StringIO()
    with EvaluationView(suite, "a model", Console(file=plain, width=120)) as view:
        view.sample({**row, "item": "a"})
        view.note("engine restarted")
    assert "1 of 8 samples" in plain.getvalue()
    assert "engine restarted" in plain.getvalue()
