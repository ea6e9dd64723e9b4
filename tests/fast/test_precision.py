"""FP8: refused by name where engine, GPU or model cannot do it, and never ignored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from prorl_nemo.errors import RecipeError
from prorl_nemo.megatron.layout import ModelSpec
from prorl_nemo.megatron.precision import (
    check_attention,
    check_fp8,
    megatron_settings,
    row_multiple,
)
from prorl_nemo.recipe import Policy

ADA, HOPPER, BLACKWELL = (8, 9), (9, 0), (10, 0)
MODEL = ModelSpec(
    family="qwen2",
    layers=28,
    hidden=1536,
    ffn=8960,
    heads=12,
    groups=2,
    head_dim=128,
    vocab=151_936,
    norm_eps=1e-6,
    rope_theta=10_000.0,
    max_positions=131_072,
    tied=False,
    qkv_bias=True,
    qk_norm=False,
)


def policy(**changes: Any) -> Policy:
    return Policy.model_validate(changes)


def refusal(
    scaling: str, capability: tuple[int, int] | None, spec: ModelSpec = MODEL, **changes: Any
) -> str:
    with pytest.raises(RecipeError) as refused:
        check_fp8(policy(fp8=scaling, **changes), spec, True, capability)
    return str(refused.value)


def test_without_the_key_nothing_is_asked() -> None:
    check_fp8(policy(), MODEL, engine=False, capability=None)
    assert megatron_settings(policy()) == {}


@pytest.mark.parametrize("scaling", ["delayed", "blockwise", "mxfp8"])
def test_needs_transformer_engine_and_a_gpu(scaling: str) -> None:
    with pytest.raises(RecipeError, match="Transformer Engine, which is not installed"):
        check_fp8(policy(fp8=scaling), MODEL, engine=False, capability=BLACKWELL)
    assert "there is none" in refusal(scaling, None)


@pytest.mark.parametrize(
    ("scaling", "possible", "impossible"),
    [
        ("delayed", [ADA, HOPPER, BLACKWELL], [(8, 0), (7, 5)]),
        ("blockwise", [HOPPER, BLACKWELL], [ADA]),
        ("mxfp8", [BLACKWELL, (12, 0)], [HOPPER]),
    ],
)
def test_hardware(
    scaling: str, possible: list[tuple[int, int]], impossible: list[tuple[int, int]]
) -> None:
    for capability in possible:
        check_fp8(policy(fp8=scaling), MODEL, True, capability)
    for capability in impossible:
        assert f"this one is {capability[0]}.{capability[1]}" in refusal(scaling, capability)


def test_sizes_and_precision() -> None:
    # 9 heads of 64 are 576; SmolLM2's two ranks have 6 heads each of 4 groups: 384.
    smollm2 = replace(MODEL, hidden=576, ffn=1536, heads=9, groups=3, head_dim=64)
    check_fp8(policy(fp8="delayed", tensor_parallel=2), smollm2, True, HOPPER)
    # The second product of the feed-forward layer takes its width, the first gives it twice.
    assert "feed-forward width of a rank (8968)" in refusal(
        "delayed", HOPPER, replace(MODEL, ffn=8968)
    )
    odd = replace(MODEL, ffn=8976)
    check_fp8(policy(fp8="delayed"), odd, True, HOPPER)
    assert "feed-forward width of a rank (4488)" in refusal(
        "delayed", HOPPER, odd, tensor_parallel=2
    )
    assert "hidden size (1544)" in refusal("blockwise", HOPPER, replace(MODEL, hidden=1544))
    narrow = replace(MODEL, hidden=1552)
    check_fp8(policy(fp8="delayed"), narrow, True, BLACKWELL)
    assert "no multiple of 32" in refusal("mxfp8", BLACKWELL, narrow)
    assert "policy.precision=bf16" in refusal("delayed", HOPPER, precision="fp32")


def test_rows_divide_into_what_every_rank_and_product_wants() -> None:
    assert row_multiple(policy()) == 1
    assert row_multiple(policy(tensor_parallel=2)) == 1
    assert row_multiple(policy(tensor_parallel=2, sequence_parallel=True)) == 2
    assert row_multiple(policy(context_parallel=2, tensor_parallel=2, sequence_parallel=True)) == 8
    assert row_multiple(policy(fp8="delayed", context_parallel=2)) == 64
    assert row_multiple(policy(fp8="mxfp8")) == 32


def test_delayed_scales_are_agreed_on_by_ranks_with_the_same_rows_only() -> None:
    """Maxima are reduced after every row. Data-parallel ranks may have different numbers of rows,
    so by default, which has them in the group, the one with more would wait for ever."""
    assert megatron_settings(policy(fp8="delayed"))["tp_only_amax_red"] is True


def test_flex_attention_needs_a_gpu() -> None:
    check_attention(policy(), None)
    check_attention(policy(attention="flex"), HOPPER)
    with pytest.raises(RecipeError, match=r"policy\.attention: flex needs a GPU"):
        check_attention(policy(attention="flex"), None)
