"""The built-in model: converted rightly, once, and never used when damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prorl_nemo import smollm2
from prorl_nemo.model_source import check_model_folder, resolve_model


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture()
def folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return resolve_model("smollm2-135m-instruct")


def test_two_processes_convert_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    program = f"from prorl_nemo.model_source import *; print(resolve_model({smollm2.NAME!r}))"
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = {process.communicate(timeout=180)[0] for process in started}
    assert len(answers) == 1
    assert [process.returncode for process in started] == [0, 0]
    left = sorted(path.name for path in (cache / "prorl_nemo").iterdir())
    assert len(left) == 2 and left[1] == left[0] + ".lock"  # Nothing half-written stays.


def test_weights_are_those_that_transformers_reads_from_the_gguf(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    check_model_folder(folder)
    gguf = smollm2._find_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    expected = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # Tied.
    }
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).config
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        assert getattr(ours, key) == getattr(model.config, key)


def test_it_answers_a_simple_question(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    answer = str(tokenizer.decode(output[inputs.input_ids.shape[1] :]))
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


def test_tokenizer_splits_digits_as_smollm_does(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Digits are cut off first, so the line breaks before one stay together.
    assert tokenizer.tokenize("a\n\n12  3") == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 2
    text = "<|im_start|>user\nWhat is  12 + é?<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_damaged_cache_is_rebuilt(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage to any file is seen; all of them are whole after one conversion, which takes 10 s."""
    good = {
        name: (folder / name).read_bytes()
        for name in ("model.safetensors", "tokenizer.json", "conversion.json")
    }

    def cut(name: str) -> None:
        (folder / name).write_bytes(good[name][: len(good[name]) // 2])

    for name, whole in good.items():
        cut(name)
        caplog.clear()
        asked: list[Path] = []
        with monkeypatch.context() as patch:
            patch.setattr(smollm2, "_convert_into", asked.append)
            smollm2.smollm2_folder()
        assert asked == [folder] and f"{name} is damaged" in caplog.text
        (folder / name).write_bytes(whole)
    for name in good:
        cut(name)
    assert smollm2.smollm2_folder() == folder
    assert {name: (folder / name).read_bytes() for name in good} == good
    assert not (folder / "damaged").exists()
