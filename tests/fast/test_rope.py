"""Scaled rotary frequencies: by hand, and bit for bit those of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from prorl_nemo.errors import ModelError
from prorl_nemo.megatron.layout import ModelSpec, RopeScaling, read_model_spec
from prorl_nemo.megatron.rope import attention_scale, inverse_frequencies

BASE: dict[str, Any] = {
    "model_type": "llama",
    "num_attention_heads": 8,
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "intermediate_size": 8,
    "vocab_size": 10,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
}
LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


def spec_of(folder: Path, rope: dict[str, Any] | None, theta: float = 10000.0) -> ModelSpec:
    config = BASE | {"rope_parameters": (rope or {}) | {"rope_theta": theta}}
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_spec(folder)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        LLAMA_31,
        LLAMA_31 | {"factor": 32.0, "original_max_position_embeddings": 300},
        QWEN_YARN,
        QWEN_YARN | {"beta_fast": 20, "beta_slow": 2.5, "truncate": False},
        QWEN_YARN | {"factor": 1.0},
        QWEN_YARN | {"attention_factor": 1.25, "original_max_position_embeddings": 64},
    ],
    ids=str,
)
def test_as_transformers(tmp_path: Path, rope: dict[str, Any], theta: float) -> None:
    spec = spec_of(tmp_path, rope, theta)
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=8,
        max_position_embeddings=8192,
        rope_parameters=rope | {"rope_theta": theta},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    assert torch.equal(inverse_frequencies(theta, 64, spec.rope_scaling), frequencies)
    assert (attention_scale(64, spec.rope_scaling) or 0.125) == pytest.approx(factor**2 / 8)


def test_plain() -> None:
    # 100^(0), 100^(-1/2): one radian and a tenth per position.
    assert inverse_frequencies(100.0, 4, None).tolist() == pytest.approx([1.0, 0.1])
    assert attention_scale(4, None) is None


def test_linear_by_hand() -> None:
    scaling = RopeScaling("linear", 4.0)
    assert inverse_frequencies(100.0, 4, scaling).tolist() == pytest.approx([0.25, 0.025])


def test_llama3_by_hand() -> None:
    # Waves of 6.28, 62.8 and 628 positions in a context of 100 with bounds 1 and 4: shorter than
    # 25 stays, longer than 100 is stretched 8 times, and 62.8 is blended: (100 / 62.8 - 1) / 3.
    scaling = RopeScaling("llama3", 8.0, 100, 1.0, 4.0)
    blend = (100 * 0.1 / (2 * math.pi) - 1) / 3
    expected = [1.0, 0.1 * (blend + (1 - blend) / 8), 0.01 / 8]
    assert inverse_frequencies(1000.0, 6, scaling).tolist() == pytest.approx(expected)


def test_yarn_by_hand() -> None:
    # dim 8, base 10000: channels 1, 0.1, 0.01, 0.001. In a context of 2 pi 1000 the first turns
    # 1000 times. beta 10 and 1 put the ends of the ramp at 8 ln(100) / (2 ln 1e4) = 2 and at 3:
    # the last channel is stretched, the others are not.
    scaling = RopeScaling("yarn", 2.0, 6283, beta_fast=10.0, beta_slow=1.0, truncate=False)
    found = inverse_frequencies(10000.0, 8, scaling).tolist()
    # 6283 is 2 pi 1000 to 3e-5 only.
    assert found == pytest.approx([1.0, 0.1, 0.01, 0.0005], rel=1e-4)
    assert attention_scale(8, scaling) == pytest.approx((0.1 * math.log(2) + 1) ** 2 / 8**0.5)


def test_older_configs(tmp_path: Path) -> None:
    config = BASE | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_model_spec(tmp_path)
    assert spec.rope_scaling == RopeScaling("linear", 2)
    assert spec.rope_theta == 5e5


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear"}, "factor must be a positive number"),
        ({"rope_type": "linear", "factor": -1}, "factor must be a positive number"),
        ({"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings"),
        (QWEN_YARN | {"mscale": 1.0}, "mscale of rope_type 'yarn'"),
        (QWEN_YARN | {"partial_rotary_factor": 0.5}, "uses partial_rotary_factor 0.5"),
        (LLAMA_31 | {"high_freq_factor": 1.0}, "must differ"),
        ({"rope_type": "longrope"}, "rope_type 'longrope'"),
        ({"rope_type": ["yarn"]}, "rope_type ['yarn']"),
    ],
)
def test_refused(tmp_path: Path, rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as error:
        spec_of(tmp_path, rope)
    assert message in str(error.value)
