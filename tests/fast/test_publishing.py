"""What lies beside published weights: card, log, recipe, evaluations; nothing private, no lies."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from prorl_nemo.errors import UserError
from prorl_nemo.harness.model import folder_sha256
from prorl_nemo.publishing.card import base_model, data_sets, known_licence, model_card
from prorl_nemo.publishing.folder import about, add_evaluations, add_training, write_card
from prorl_nemo.publishing.publish import prepare, show
from prorl_nemo.publishing.upload import check_names, files_of
from prorl_nemo.recipe import parse_recipe
from prorl_nemo.reporting.run import read_run
from prorl_nemo.strict_yaml import dump_yaml, load_yaml
from prorl_nemo.tiny_model import tiny_model

RECIPE: dict[str, Any] = {
    "name": "small-run",
    "model": "smollm2-135m-instruct",
    "runs_dir": "/home/someone/runs",
    "data": {
        "sources": [
            {"task": "coin_flip"},
            {"kind": "built", "domain": "stem", "folder": "/home/someone/data"},
        ],
        "build": {"folder": "/home/someone/data", "sources": [{"source": "scp"}]},
    },
    "stages": [{"steps": 2, "name": "short | <b>"}, {"steps": 8}],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(an exported folder of step 4, its run)."""
    base = tmp_path_factory.mktemp("publishing")
    folder, run = tiny_model("llama", base / "export"), base / "run"
    record = {"run": "small-run", "step": 4, "model": "smollm2-135m-instruct"}
    (folder / "prorl_export.json").write_text(json.dumps(record))
    run.mkdir()
    recipe = parse_recipe(RECIPE).model_dump(mode="json")
    (run / "recipe.yaml").write_text(dump_yaml(recipe))
    names = {1: (1, "short | <b>"), 2: (1, "short | <b>")}
    metrics = [
        {"kind": "train", "step": step, "stage": names.get(step, (2, ""))[0],
         "stage_name": names.get(step, (2, None))[1], "rollout/response_limit": 64}
        for step in range(1, 7)
    ]  # fmt: skip
    metrics += [
        {
            "kind": "validation",
            "step": step,
            "validation/mean": step / 10,
            "validation/stderr": 0.01,
        }
        for step in (0, 4, 6)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    events = [
        {"time": 1.0, "step": 0, "event": "run_started", "recipe": "x"},
        {"time": 2.0, "step": 3, "event": "reference_reset", "trigger": "kl_spike"},
        {"time": 2.0, "step": 3, "event": "checkpoint_saved", "path": "/home/someone/runs/x"},
        {"time": 2.0, "step": 3, "event": "resumed", "checkpoint": "/home/someone/runs/x"},
        {"time": 2.0, "step": 3, "event": "stopped", "reason": "engine 0: no /home/someone/lib"},
        {"time": 3.0, "step": 6, "event": "reference_reset", "trigger": "interval"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in events)
    (run / "events.jsonl").write_text(lines + '{"torn')
    add_training(folder, run)
    return folder, run


@pytest.fixture
def folder(exported: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(exported[0], tmp_path / "export")


def test_only_runs_by_its_rules_are_said_to_be_prorl_v2(exported: tuple[Path, Path]) -> None:
    said = about(exported[0])
    run = read_run(exported[1], with_samples=False)
    assert "by the rules of ProRL v2" in model_card(said, run, [], curves=False)
    no_resets = dict.fromkeys(("interval", "kl_factor", "stalled_evaluations"))
    for section, change in (
        ("algorithm", {"advantage": "grpo"}),
        ("algorithm", {"clip_high": 0.2}),
        ("algorithm", {"kl": {"estimator": "k2", "coefficient": 0.0}}),
        ("rollout", {"dynamic_sampling": False}),
        ("shaping", {"cosine": None}),
        ("reference_reset", no_resets),
    ):
        other = replace(run, recipe=run.recipe | {section: run.recipe[section] | change})
        assert "ProRL v2" not in model_card(said, other, [], curves=False), change
    # What a stage has of its own goes before the recipe's.
    off = [stage | {"cosine": "off"} for stage in run.recipe["stages"]]
    other = replace(run, recipe=run.recipe | {"stages": off})
    assert "ProRL v2" not in model_card(said, other, [], curves=False)


def test_the_card_tells_the_settings_of_each_stage(exported: tuple[Path, Path]) -> None:
    said = about(exported[0])
    run = read_run(exported[1], with_samples=False)
    stages = [
        run.recipe["stages"][0],
        run.recipe["stages"][1] | {"samples_per_prompt": 32, "clip_high": 0.4},
        # Not begun.
        run.recipe["stages"][1] | {"temperature": 2.0},
    ]
    text = model_card(said, replace(run, recipe=run.recipe | {"stages": stages}), [], curves=False)
    for line in (
        "* samples of each: 16; then 32",
        "* clip bounds: 0.2, 0.28; then 0.2, 0.4",
        "* temperature: 1.2",
        "* response limit: 8192 tokens",
    ):
        assert line in text.splitlines(), line


def test_data_sets_are_those_that_were_trained_on(exported: tuple[Path, Path]) -> None:
    run = read_run(exported[1], with_samples=False)

    def names(sources: list[dict[str, Any]], *built: str) -> list[str]:
        build = {"folder": "here", "sources": [{"source": name} for name in built]}
        data = {"sources": sources, "build": build if built else None}
        return [name for name, _, _ in data_sets(replace(run, recipe={"data": data}))]

    gym = {"kind": "reasoning_gym", "task": "gcd"}
    maths, stem = ({"kind": "built", "domain": domain} for domain in ("math", "stem"))
    scp, deepscaler = "EricLu/SCP-116K", "agentica-org/DeepScaleR-Preview-Dataset"
    assert names([gym, stem], "scp", "deepscaler") == ["Reasoning Gym", scp]
    assert names([maths, gym | {"train": False}], "scp", "deepscaler") == [deepscaler]
    assert names([maths, stem | {"train": False}], "scp", "reasoning_gym") == []
    assert names([maths | {"domain": "logic"}], "reasoning_gym") == ["Reasoning Gym"]
    # As recipes/nemotron_1.5b/v2.yaml takes what v1's recipe has built.
    assert names([stem | {"folder": "v1"}]) == ["built by another recipe: v1"]


def evaluation(folder: Path, sha256: str, out: Path, seed: int = 0) -> Path:
    """Results as `prorl eval` writes them, of some weights."""
    benchmark = {
        "name": "gsm8k", "title": "GSM8K, test", "domain": "math", "metric": "avg",
        "average": {"mean": 0.12345, "samples": 4, "items": 1319, "error_samples": 0.01},
        "interval": {"low": 0.1, "high": 0.15, "level": 0.95},
        "shares": {"truncated": 0.5}, "notes": ["20 of 1319 items"],
    }  # fmt: skip
    protocol = {"label": "quick", "sampling": {"temperature": 0.6, "top_p": 0.95, "max_tokens": 9}}
    manifest = {"model": {"sha256": sha256}, "protocol": protocol, "seed": seed}
    out.mkdir()
    document = {"manifest": manifest, "benchmarks": [benchmark]}
    (out / "results.json").write_text(json.dumps(document))
    (out / "results.md").write_text("page")
    return out


def test_log_and_recipe_end_with_the_step_and_hold_no_paths(folder: Path) -> None:
    training = folder / "training"
    metrics = [json.loads(line) for line in (training / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 0, 4]
    events = [json.loads(line) for line in (training / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == [
        "run_started", "reference_reset", "resumed", "stopped",
    ]  # fmt: skip
    for path in folder.rglob("*"):
        assert path.is_dir() or b"/home/someone" not in path.read_bytes(), path
    recipe = load_yaml((training / "recipe.yaml").read_text())
    assert parse_recipe(recipe).data.build is not None
    assert recipe["runs_dir"] == "runs"
    assert "<svg" in (folder / "curves.svg").read_text()


def test_the_card_is_read_by_the_hub_s_library(folder: Path, tmp_path: Path) -> None:
    results = evaluation(folder, folder_sha256(folder), tmp_path / "evaluation")
    add_evaluations(folder, [results])
    text = write_card(folder)
    card = ModelCard(text)
    metadata = card.data.to_dict()
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert metadata["license"] == "apache-2.0"
    assert metadata["datasets"] == ["EricLu/SCP-116K"]
    assert metadata["pipeline_tag"] == "text-generation"
    (score,) = card.data.eval_results
    assert (score.dataset_type, score.metric_value) == ("gsm8k", 12.35)
    assert score.metric_name == "avg@4 under quick"
    for part in (
        "# small-run, step 4",
        "after 4 steps",
        "| short \\| &lt;b> | 1 to 2 | 64 |",
        "after step 3 (kl\\_spike).",
        "* step 0: 0.000 ± 0.010",
        "* step 4: 0.400 ± 0.010",
        "![Held-out score by step](curves.svg)",
        "| 12.35 | 10.00 to 15.00 | 1.00 | 50.00 |",
        "20 of 1319 items",
        "no commercial use",
        "Reasoning Gym",
        "## Limits",
    ):
        assert part in text, part
    assert (folder / "evaluation" / "quick.md").read_text() == "page"


def test_two_evaluations_under_one_protocol_are_both_kept(folder: Path, tmp_path: Path) -> None:
    sha256 = folder_sha256(folder)
    both = [evaluation(folder, sha256, tmp_path / str(seed), seed) for seed in (0, 1)]
    for _ in range(2):  # The same ones again are no others.
        add_evaluations(folder, both)
        assert {path.name for path in (folder / "evaluation").iterdir()} == {
            "quick.json", "quick.md", "quick-2.json", "quick-2.md",
        }  # fmt: skip
    card = write_card(folder)
    assert "seed 0; in percent" in card and "seed 1; in percent" in card


def test_an_evaluation_of_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    results = evaluation(folder, "0" * 64, tmp_path / "evaluation")
    with pytest.raises(UserError, match="measured other weights"):
        add_evaluations(folder, [results])
    with pytest.raises(UserError, match="holds no results"):
        add_evaluations(folder, [tmp_path])


def test_without_evaluation_or_log_the_card_says_so(tmp_path: Path) -> None:
    folder = tiny_model("qwen2", tmp_path / "export")
    record = {"run": "r", "step": 1, "model": "/home/someone/secret-model"}
    (folder / "prorl_export.json").write_text(json.dumps(record))
    text = write_card(folder, "mit")
    assert "Not evaluated on public benchmarks." in text
    assert "log of the training is not part" in text
    assert "/home" not in text
    assert ModelCard(text).data.license == "mit"
    assert ModelCard(text).data.base_model is None


def test_what_must_not_be_published_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / ".env").write_text("SECRET=1")
    (folder / "notes.part").write_text("")
    names = {file.path for file in files_of(folder)}
    assert {"model.safetensors", "training/recipe.yaml", "curves.svg"} <= names
    assert not {".env", "notes.part"} & names
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="a link"):
        prepare(folder, "us/model")
    (folder / "link").unlink()
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="truncated or damaged"):
        prepare(folder, "us/model")
    with pytest.raises(UserError, match="no export of a run"):
        prepare(tmp_path, "us/model")


def test_a_licence_is_never_invented(folder: Path) -> None:
    record = about(folder) | {"model": "org/unknown"}
    (folder / "prorl_export.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"--license: that of org/unknown"):
        prepare(folder, "us/model")
    assert "license: mit" in prepare(folder, "us/model", licence="mit").card
    assert base_model(record) == "org/unknown"
    assert known_licence(record) is None


@pytest.mark.parametrize(
    "name", ["model", "a/b/c", "/b", "a/", "-a/b", "a/b?", "a b/c", "a/" + "b" * 97]
)
def test_names_are_checked_before_anything_is_sent(name: str) -> None:
    with pytest.raises(UserError, match="--repo"):
        check_names(name, "step-000001")


@pytest.mark.parametrize("tag", ["", "a..b", "a b", "-a", "a/b"])
def test_tags_are_checked_before_anything_is_sent(tag: str) -> None:
    with pytest.raises(UserError, match="--tag"):
        check_names("us/model", tag)


def test_a_dry_run_names_every_file_and_prints_the_card(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = prepare(folder, "us/model")
    assert ready.tag == "step-000004"
    show(ready, True, Console(width=120))
    shown = capsys.readouterr().out
    for file in ready.files:
        assert file.path in shown
        assert f"{file.size:,}" in shown
    assert ready.card.strip().splitlines()[-1] in shown
    assert "nothing was sent" in shown
