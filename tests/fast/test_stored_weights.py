"""A checkpoint's tensors under their Hugging Face names: layouts by hand, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import save

from prorl_nemo.errors import ModelError, UserError
from prorl_nemo.megatron.layout import ModelSpec
from prorl_nemo.megatron.stored_weights import check_model, stored_weights

# Two layers; four query heads in two groups of key/value heads, of size 3.
SPEC = ModelSpec(
    family="qwen2",
    layers=2,
    hidden=5,
    ffn=4,
    heads=4,
    groups=2,
    head_dim=3,
    vocab=7,
    norm_eps=1e-6,
    rope_theta=10_000.0,
    max_positions=64,
    tied=True,
    qkv_bias=True,
    qk_norm=False,
)


def hf_weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj.weight": (12, 5),
        "self_attn.k_proj.weight": (6, 5),
        "self_attn.v_proj.weight": (6, 5),
        "self_attn.q_proj.bias": (12,),
        "self_attn.k_proj.bias": (6,),
        "self_attn.v_proj.bias": (6,),
        "self_attn.o_proj.weight": (5, 12),
        "mlp.gate_proj.weight": (4, 5),
        "mlp.up_proj.weight": (4, 5),
        "mlp.down_proj.weight": (5, 4),
        "input_layernorm.weight": (5,),
        "post_attention_layernorm.weight": (5,),
    }
    weights = {
        f"model.layers.{layer}.{name}": torch.randn(shape, generator=draw)
        for layer in range(2)
        for name, shape in shapes.items()
    }
    weights["model.embed_tokens.weight"] = torch.randn(7, 5, generator=draw)
    weights["model.norm.weight"] = torch.randn(5, generator=draw)
    return weights


def megatron_weights(hf: dict[str, Tensor], added_groups: int = 0, padding: int = 0) -> dict:
    """As Megatron stores them, row by row; with groups and words that a layout added."""
    stacked: dict[str, list[Tensor]] = {}
    for layer in range(2):
        part = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in hf.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        rows: dict[str, list[Tensor]] = {"weight": [], "bias": []}
        for kind, stack in rows.items():
            q, k, v = (part[f"self_attn.{p}_proj.{kind}"] for p in "qkv")
            for group in range(2):
                stack += q[group * 6 : group * 6 + 6]  # two heads of three channels
                stack += k[group * 3 : group * 3 + 3]
                stack += v[group * 3 : group * 3 + 3]
            stack += [torch.zeros_like(q[0])] * (12 * added_groups)
        columns = [*part["self_attn.o_proj.weight"].t(), *[torch.zeros(5)] * (6 * added_groups)]
        gate_up = torch.cat((part["mlp.gate_proj.weight"], part["mlp.up_proj.weight"]))
        made = {
            "self_attention.linear_qkv.weight": torch.stack(rows["weight"]),
            "self_attention.linear_qkv.bias": torch.stack(rows["bias"]),
            "self_attention.linear_proj.weight": torch.stack(columns).t().contiguous(),
            "mlp.linear_fc1.weight": gate_up,
            "mlp.linear_fc2.weight": part["mlp.down_proj.weight"],
            "self_attention.linear_qkv.layer_norm_weight": part["input_layernorm.weight"],
            "mlp.linear_fc1.layer_norm_weight": part["post_attention_layernorm.weight"],
        }
        for name, tensor in made.items():
            stacked.setdefault(f"decoder.layers.{name}", []).append(tensor)
    words = hf["model.embed_tokens.weight"]
    return {
        **{name: torch.stack(tensors) for name, tensors in stacked.items()},
        "embedding.word_embeddings.weight": torch.cat((words, torch.zeros(padding, 5))),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }


def write(folder: Path, weights: dict[str, Tensor], spec: ModelSpec = SPEC) -> Path:
    others = {f"reference.{name}": -w for name, w in weights.items()}
    moments = {f"optimizer.exp_avg.{name}": 2 * w for name, w in weights.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({**weights, **others, **moments}, checkpoint_id=folder, no_dist=True)
    torch.save({"spec": asdict(spec), "adam_step": 3}, folder / "common.pt")
    return folder


@pytest.mark.parametrize(("added_groups", "padding"), [(0, 0), (1, 1), (2, 9)])
def test_every_weight_by_its_name(tmp_path: Path, added_groups: int, padding: int) -> None:
    wanted = hf_weights()
    folder = write(tmp_path, megatron_weights(wanted, added_groups, padding))
    found = dict(stored_weights(folder, SPEC))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_the_type_is_kept(tmp_path: Path) -> None:
    halves = {name: w.to(torch.bfloat16) for name, w in megatron_weights(hf_weights()).items()}
    found = dict(stored_weights(write(tmp_path, halves), SPEC))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_value_is_refused(tmp_path: Path, value: float) -> None:
    weights = megatron_weights(hf_weights())
    weights["decoder.layers.mlp.linear_fc2.weight"][1, 2, 3] = value
    with pytest.raises(UserError, match=r"linear_fc2.*missing, NaN or infinite"):
        list(stored_weights(write(tmp_path, weights), SPEC))


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, megatron_weights(hf_weights()))
    check_model(folder, SPEC)
    with pytest.raises(ModelError, match="its rope_theta differ"):
        check_model(folder, replace(SPEC, rope_theta=1e6))
    with pytest.raises(ModelError, match="another model"):
        next(stored_weights(folder, replace(SPEC, heads=2, head_dim=6)))


def test_a_weight_without_a_name_is_refused(tmp_path: Path) -> None:
    weights = megatron_weights(hf_weights())
    weights["decoder.layers.mlp.router.weight"] = torch.zeros(2, 4, 5)
    with pytest.raises(ModelError, match=r"mlp\.router\.weight: no mapping"):
        list(stored_weights(write(tmp_path, weights), SPEC))
