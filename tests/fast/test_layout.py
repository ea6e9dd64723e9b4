"""What the model is, and which layouts can hold it: read by name, refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prorl_nemo.errors import ModelError, RecipeError
from prorl_nemo.megatron.layout import ModelSpec, check_layout, padded_vocab, read_model_spec
from prorl_nemo.planning.shapes import KNOWN
from prorl_nemo.recipe import Policy
from prorl_nemo.tiny_model import Family, tiny_model

# DeepSeek-R1-Distill-Qwen-1.5B as published (transformers 4 writes rope_theta at the top).
DISTILL: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def spec_of(folder: Path, config: Any) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_spec(folder)


def test_the_model_of_the_paper(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, DISTILL)
    # The planner's table has the same shape.
    assert spec == KNOWN["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]
    assert (spec.head_dim, spec.tied, spec.qkv_bias, spec.qk_norm) == (128, False, True, False)
    # 28 (1536*128*(2*12 + 2*2) + 3*1536*8960) + 2*151936*1536; published as 1.78 B.
    assert spec.parameters == 28 * (5_505_024 + 41_287_680) + 466_747_392


def test_what_a_config_may_leave_out(tmp_path: Path) -> None:
    config = {k: v for k, v in DISTILL.items() if k not in ("num_key_value_heads", "rope_theta")}
    del config["tie_word_embeddings"]
    spec = spec_of(tmp_path, config | {"rope_parameters": {"rope_theta": 5e5}})
    assert (spec.groups, spec.rope_theta, spec.tied) == (12, 5e5, False)
    assert spec_of(tmp_path, config).rope_theta == 10000.0  # transformers' default


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_against_transformers(tmp_path: Path, family: Family, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(family, tmp_path / "model", tied=tied, heads=4, kv_heads=2)
    spec = read_model_spec(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters()}
    assert spec.qk_norm == ("q_norm" in names)
    assert spec.qkv_bias == any(n.endswith("q_proj.bias") for n, _ in model.named_parameters())
    assert spec.tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    # Memory is reckoned from the matrices; norms and biases are a fraction of a percent.
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert spec.parameters == matrices


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "has model_type 'mamba'; mapped families: llama, "),
        ({"model_type": None}, "has model_type None"),
        ({"use_sliding_window": True}, "uses sliding windows"),
        ({"hidden_act": "gelu"}, "uses hidden_act 'gelu'"),
        ({"model_type": "llama", "attention_bias": True}, "uses attention_bias"),
        ({"model_type": "llama", "mlp_bias": True}, "uses mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "uses quantization_config"),
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "uses partial_rotary_factor 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "uses partial_rotary_factor 0.25"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_parameters": "none"}, "rope_type 'none'"),
    ],
)
def test_unmapped_or_nonsense(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as error:
        spec_of(tmp_path, DISTILL | change)
    assert "config.json" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("missing", ["num_hidden_layers", "vocab_size", "max_position_embeddings"])
def test_missing(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ModelError, match=missing):
        spec_of(tmp_path, {k: v for k, v in DISTILL.items() if k != missing})


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_model_spec(tmp_path)
    for content in ("{", "[1]", "null"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError, match=r"config\.json"):
            read_model_spec(tmp_path)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"tensor_parallel": 4}, "policy.tensor_parallel: 4 does not divide"),
        ({"tensor_parallel": 5}, "policy.tensor_parallel: 5 does not divide"),
        ({"pipeline_parallel": 3}, "policy.pipeline_parallel: 3 does not divide"),
    ],
)
def test_layouts_that_do_not_divide(tmp_path: Path, policy: dict[str, int], message: str) -> None:
    spec = spec_of(tmp_path, DISTILL)
    with pytest.raises(RecipeError) as error:
        check_layout(Policy(**policy), spec)
    assert message in str(error.value)
    # What it offers is right: common divisors of 12, 2, 8960, or divisors of 28.
    offered = str(error.value).rpartition("possible: ")[2]
    assert offered == ("1, 2" if "tensor" in message else "1, 2, 4, 7, 14, 28")


def test_every_problem_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)tensor_parallel.*pipeline_parallel"):
        check_layout(Policy(tensor_parallel=3, pipeline_parallel=3), spec_of(tmp_path, DISTILL))


def test_layouts_that_do(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, DISTILL)
    for tensor, pipeline in ((1, 1), (2, 1), (1, 28), (2, 14)):
        check_layout(Policy(tensor_parallel=tensor, pipeline_parallel=pipeline), spec)


@pytest.mark.parametrize(
    ("vocab", "ranks", "padded"), [(301, 1, 301), (301, 2, 302), (300, 4, 300)]
)
def test_vocabulary_over_ranks(tmp_path: Path, vocab: int, ranks: int, padded: int) -> None:
    assert padded_vocab(spec_of(tmp_path, DISTILL | {"vocab_size": vocab}), ranks) == padded


def test_a_layout_has_a_name_and_a_single_rank_beside_it() -> None:
    policy = Policy.model_validate(
        {
            "tensor_parallel": 2,
            "sequence_parallel": True,
            "pipeline_parallel": 4,
            "virtual_pipeline": 3,
            "context_parallel": 2,
            "data_parallel": 8,
            "optimizer": {"learning_rate": 3e-6},
        }
    )
    assert policy.layout == "TP 2, SP, PP 4, VPP 3, CP 2, DP 8"
    alone = policy.on_one_rank()
    assert (alone.ranks, alone.layout) == (1, "one rank")
    assert alone == Policy.model_validate({"optimizer": {"learning_rate": 3e-6}})
