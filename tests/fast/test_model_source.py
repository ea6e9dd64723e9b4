"""Folders are looked at before use; tiny models are real models."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from prorl_nemo.errors import ModelError
from prorl_nemo.model_source import check_model_folder, resolve_model
from prorl_nemo.tiny_model import Family, tiny_model

FAMILIES: tuple[Family, ...] = get_args(Family)


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "model", layers=1)


def _shard(folder: Path) -> Path:
    """Cut the weights in two with an index, as large models come."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_a_complete_folder_is_taken_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(folder)) == folder.resolve()
    monkeypatch.chdir(folder.parent)
    assert resolve_model("model") == folder.resolve()  # A folder wins over a hub name.
    _shard(folder)
    assert resolve_model(str(folder)) == folder.resolve()


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("config.json", 0.5, "config.json: cannot be read"),
        ("config.json", None, "config.json: missing"),
        ("tokenizer.json", 0.5, "tokenizer.json: cannot be read"),
        ("tokenizer.json", None, "has no tokenizer"),
        ("model.safetensors", 0.5, "model.safetensors: truncated or damaged"),
        ("model.safetensors", 0.0, "model.safetensors: truncated or damaged"),
        ("model.safetensors", 0.001, "model.safetensors: truncated or damaged"),
        ("model.safetensors", None, "has no model.safetensors"),
    ],
)
def test_damage_is_named(folder: Path, name: str, keep: float | None, message: str) -> None:
    path = folder / name
    if keep is None:
        path.unlink()
    else:
        os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder))


def test_one_missing_byte_of_the_weights_is_found(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ModelError, match="truncated"):
        check_model_folder(folder)


def test_shards_are_checked_against_the_index(folder: Path) -> None:
    index = _shard(folder)
    second = folder / "model-00002-of-00002.safetensors"
    weights = load_file(second)
    absent = next(iter(weights))
    del weights[absent]
    save_file(weights, second)
    with pytest.raises(ModelError, match=f"lacks {absent}"):
        check_model_folder(folder)
    second.unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors: missing"):
        check_model_folder(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelError, match="outside its folder"):
        check_model_folder(folder)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ModelError, match="no weight_map"):
        check_model_folder(folder)


def test_two_sets_of_weights_are_refused(folder: Path) -> None:
    """transformers reads the single file, vLLM the shards: they may be of different models."""
    single = (folder / "model.safetensors").read_bytes()
    index = _shard(folder)
    (folder / "model.safetensors").write_bytes(single)
    with pytest.raises(ModelError, match=r"both model\.safetensors and .*index\.json"):
        check_model_folder(folder)
    names = load_file(folder / "model.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    check_model_folder(folder)  # An index of the same file says the same.


def test_a_truncated_gigabyte_is_found_at_once(folder: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 28], "data_offsets": [0, 1 << 30]}})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + (1 << 30) - 4096)  # Sparse: takes no room on the disk.
    start = time.perf_counter()
    with pytest.raises(ModelError, match="truncated"):
        check_model_folder(folder)
    assert time.perf_counter() - start < 1.0  # A read of the file would take longer.


def test_other_wrong_folders(folder: Path, tmp_path: Path) -> None:
    lfs = folder / "model.safetensors"
    lfs.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        check_model_folder(folder)
    lfs.unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="pickled"):
        check_model_folder(folder)
    with pytest.raises(ModelError, match="is not a folder"):
        resolve_model(str(folder / "config.json"))
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object"):
        check_model_folder(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no model_type"):
        check_model_folder(folder)
    with pytest.raises(ModelError, match="there is no folder"):
        resolve_model(str(tmp_path / "nothing"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    small = tiny_model("llama", tmp_path / "small", vocab_size=300, layers=1)
    large = tiny_model("llama", tmp_path / "large", vocab_size=400, layers=1)
    check_model_folder(large)
    (small / "tokenizer.json").write_bytes((large / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match=r"token 399 is beyond the model's vocab_size \(300\)"):
        check_model_folder(small)


def test_a_revision_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ProRL's first weights are a tag of the repository that holds the second."""
    import huggingface_hub

    folder = tiny_model("llama", tmp_path / "model")
    asked: list[tuple[str, str | None]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name in ("org/name@v1", "org/name"):
        assert resolve_model(name) == folder
    assert asked == [("org/name", "v1"), ("org/name", None)]


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"hub cannot be reached.*did you mean smollm2-135m"):
        resolve_model("some-org/SmolLM2-135M")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_tiny_models_are_deterministic_and_complete(
    family: Family, tied: bool, tmp_path: Path
) -> None:
    global_state = torch.random.get_rng_state()
    first = tiny_model(family, tmp_path / "a", tied=tied, seed=3)
    assert torch.equal(torch.random.get_rng_state(), global_state)
    again = tiny_model(family, tmp_path / "b", tied=tied, seed=3)
    other = tiny_model(family, tmp_path / "c", tied=tied, seed=4)
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    weights = load_file(first / "model.safetensors")
    assert ("lm_head.weight" in weights) is not tied
    for name, tensor in load_file(other / "model.safetensors").items():
        assert not torch.equal(tensor, weights[name]), name
    # Biases and norms differ from what a mapping that forgets them would leave: 0 and 1.
    for name, tensor in weights.items():
        if tensor.dim() == 1:
            assert tensor.std() > 0.05, name
    assert any(name.endswith("q_proj.bias") for name in weights) is (family == "qwen2")
    assert any(name.endswith("q_norm.weight") for name in weights) is (family == "qwen3")
    check_model_folder(first)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_load_and_are_awake(family: Family, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tiny_model(family, tmp_path / "m", vocab_size=301, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert load_file(path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert len(tokenizer) == model.config.vocab_size == 301
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    text = "12 + 7 = é 😀\n<|im_end|>"
    token_ids = tokenizer(text).input_ids
    assert tokenizer.decode(token_ids) == text
    assert token_ids[-1] == tokenizer.eos_token_id
    logits = model(torch.tensor([token_ids])).logits
    # Drawn for deviation 1.5; a random model of the usual 0.02 would give about 0.2 here.
    assert 1.0 < logits.std() < 2.0


def test_tiny_model_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="at least 260"):
        tiny_model("llama", tmp_path / "m", vocab_size=259)
    with pytest.raises(ModelError, match="kv_heads"):
        tiny_model("llama", tmp_path / "m", heads=4, kv_heads=3)
    with pytest.raises(ModelError, match="none of llama, "):
        tiny_model("gpt", tmp_path / "m")  # type: ignore[arg-type]
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(ModelError, match="not empty"):
        tiny_model("llama", taken)
