"""The shape of a recipe's model, without its weights and without asking the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prorl_nemo.errors import ModelError
from prorl_nemo.megatron.layout import ModelSpec, RopeScaling, read_model_spec

_R1_QWEN_1_5B = ModelSpec(
    family="qwen2",
    layers=28,
    hidden=1536,
    ffn=8960,
    heads=12,
    groups=2,
    head_dim=128,
    vocab=151936,
    norm_eps=1e-6,
    rope_theta=10000.0,
    max_positions=131072,
    tied=False,
    qkv_bias=True,
    qk_norm=False,
)
_QWEN3_4B = ModelSpec(
    family="qwen3",
    layers=36,
    hidden=2560,
    ffn=9728,
    heads=32,
    groups=8,
    head_dim=128,
    vocab=151936,
    norm_eps=1e-6,
    rope_theta=1e6,
    max_positions=40960,
    tied=True,
    qkv_bias=False,
    qk_norm=True,
)
_SMOLLM2_135M = ModelSpec(
    family="llama",
    layers=30,
    hidden=576,
    ffn=1536,
    heads=9,
    groups=3,
    head_dim=64,
    vocab=49152,
    norm_eps=1e-5,
    rope_theta=1e5,
    max_positions=8192,
    tied=True,
    qkv_bias=False,
    qk_norm=False,
)
_QWEN2_5_MATH_1_5B = replace(_R1_QWEN_1_5B, max_positions=4096, tied=True)
_TINY_ARITHMETIC = replace(
    _SMOLLM2_135M,
    layers=2,
    hidden=64,
    ffn=128,
    heads=2,
    groups=1,
    head_dim=32,
    vocab=512,
    norm_eps=1e-6,
    rope_theta=10000.0,
    max_positions=2048,
)
_LLAMA_3_1_8B = ModelSpec(
    family="llama",
    layers=32,
    hidden=4096,
    ffn=14336,
    heads=32,
    groups=8,
    head_dim=128,
    vocab=128256,
    norm_eps=1e-5,
    rope_theta=5e5,
    max_positions=131072,
    tied=False,
    qkv_bias=False,
    qk_norm=False,
    rope_scaling=RopeScaling("llama3", 8.0, original_positions=8192),
)
KNOWN = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _R1_QWEN_1_5B,
    "Qwen/Qwen2.5-Math-1.5B": _QWEN2_5_MATH_1_5B,
    "Qwen/Qwen3-4B": _QWEN3_4B,
    "meta-llama/Llama-3.1-8B": _LLAMA_3_1_8B,
    "smollm2-135m-instruct": _SMOLLM2_135M,
    "tiny-arithmetic": _TINY_ARITHMETIC,
    # What recipes/nemotron_1.5b/v2.yaml begins with, planned before v1 has made it.
    "exports/nemotron_1.5b_v1": _R1_QWEN_1_5B,
}
"""Shapes by hub name, as their published config.json has them."""


def model_shape(name: str) -> ModelSpec:
    """The shape of a model folder (its config.json is enough), or of a name in `KNOWN`.

    Raises:
        ModelError: neither, or a config that this project does not map.
    """
    try:
        folder = Path(name).expanduser()
        there = folder.is_dir()
    except (RuntimeError, OSError, ValueError) as error:
        raise ModelError(f"model: {name!r}: {error}") from None
    if there:
        return read_model_spec(folder)
    if name in KNOWN:
        return KNOWN[name]
    raise ModelError(
        f"model: the shape of {name!r} is not known here; give --model a folder with its "
        f"config.json, or one of {', '.join(KNOWN)}"
    )
