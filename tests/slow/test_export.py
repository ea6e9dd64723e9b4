"""A checkpoint as a Hugging Face folder: the trainer's weights, loaded by transformers and vLLM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import independent_policy as independent
import numpy as np
import pytest
import torch
from layout_runs import Layout, recipe, train_and_save, union_of_weights
from ranks import run_ranks
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prorl_nemo.errors import UserError
from prorl_nemo.export import export_step
from prorl_nemo.publishing.self_check import check_export, compare_weights
from prorl_nemo.recipe import load_recipe
from prorl_nemo.strict_yaml import dump_yaml
from prorl_nemo.tiny_model import tiny_model
from prorl_nemo.training.run_state import Checkpoints

PROMPT, NEW_TOKENS = "what is the sum of two and three?", 24
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
settings = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_model_len": 128}
llm = LLM(sys.argv[1], dtype="float32", **settings)  # The default for fp32 weights is 16 bits.
chat = [{"role": "user", "content": sys.argv[2]}]
(answer,) = llm.chat(chat, SamplingParams(temperature=0, max_tokens=int(sys.argv[3])))
said = answer.outputs[0]
print(json.dumps([list(answer.prompt_token_ids), list(said.token_ids), said.text]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A run directory with a checkpoint of step 3, and the weights that were trained until then.

    Of two tensor-parallel ranks, which add a fourth key/value head to three, in two stages.
    """
    folder = tmp_path_factory.mktemp("export")
    model = tiny_model("llama", folder / "model", hidden_size=192, heads=6, kv_heads=3)
    data, _, _ = independent.make_data(AutoModelForCausalLM.from_pretrained(model))
    settings = recipe(Layout("llama", True, tp=2, pp=2), model)
    policy = folder / "policy"
    policy.mkdir()
    answers = run_ranks(train_and_save, 4, settings, model, data, policy)
    checkpoints = Checkpoints(folder / "run" / "checkpoints", 1)

    def copy(to: Path) -> Callable[[], None]:
        shutil.copytree(policy, to, dirs_exist_ok=True)
        return lambda: None

    checkpoints.begin(3, {}, copy)
    checkpoints.close()
    (folder / "run" / "recipe.yaml").write_text(dump_yaml(settings.model_dump(mode="json")))
    return folder / "run", union_of_weights(answers, "saved")


def test_transformers_and_vllm_load_it_and_agree(
    run: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    run_dir, trained = run
    out = tmp_path / "out"
    assert export_step(run_dir, out, shard_bytes=200_000) == 3

    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for name, t in trained.items() if name != "lm_head.weight"
    )
    for file in files:
        with safe_open(out / file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                assert np.array_equal(tensors.get_tensor(name), trained[name]), name

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert np.array_equal(tensor.numpy(), trained[name]), name

    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS)
    asked, said = answer[0].split([prompt["input_ids"].shape[1], NEW_TOKENS])
    # vLLM holds back the bytes of a character that is not complete.
    text = tokenizer.decode(said, skip_special_tokens=True).rstrip("\ufffd")
    found = subprocess.run(
        [sys.executable, "-c", VLLM, str(out), PROMPT, str(NEW_TOKENS)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1]) == [asked.tolist(), said.tolist(), text]


def test_the_self_check_passes_and_sees_one_changed_weight(
    run: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = run
    out = tmp_path / "out"
    export_step(run_dir, out)
    assert check_export(out, run_dir, Console(width=120)), capsys.readouterr().out
    assert capsys.readouterr().out.count(" ok ") == 4

    recipe = load_recipe(run_dir / "recipe.yaml")
    policy = run_dir / "checkpoints" / "step_000003" / "policy"
    different, count = compare_weights(out, policy, recipe)
    assert (different, count) == (0, len(load_file(out / "model.safetensors")))
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert compare_weights(out, policy, recipe) == (1, count)


def test_what_cannot_be_exported_is_refused(
    run: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    run_dir, _ = run
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no checkpoint of step 4, but of 3"):
        export_step(run_dir, out, step=4)
    with pytest.raises(UserError, match="no run directory"):
        export_step(tmp_path, out)

    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        export_step(run_dir, taken)

    # The same weights, read as a model with another rotary base.
    recipe_file = run_dir / "recipe.yaml"
    before = recipe_file.read_text()
    other = tiny_model("llama", tmp_path / "other", hidden_size=192, heads=6, kv_heads=3)
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e6
    (other / "config.json").write_text(json.dumps(config))
    settings = recipe(Layout("llama", True), other)
    recipe_file.write_text(dump_yaml(settings.model_dump(mode="json")))
    with pytest.raises(UserError, match=r"another model .*rope_theta"):
        export_step(run_dir, out)
    recipe_file.write_text(before)

    weights = next((run_dir / "checkpoints" / "step_000003" / "policy").glob("*.distcp"))
    altered = bytearray(weights.read_bytes())
    altered[len(altered) // 2] ^= 1
    weights.write_bytes(altered)
    with pytest.raises(UserError, match="damaged"):
        export_step(run_dir, out)
    assert not out.exists()
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
