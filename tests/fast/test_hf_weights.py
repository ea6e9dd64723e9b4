"""Weight layouts as pure tensor rules, without Megatron: what is split must come back whole."""

from __future__ import annotations

import pytest
import torch

from prorl_nemo.errors import ModelError
from prorl_nemo.megatron.hf_weights import Shape, rule_for

# SmolLM2's proportions: 9 heads in 3 groups, which two ranks can only share once padded to 4.
HEADS, GROUPS, DIM, HIDDEN = 9, 3, 4, 20
WEIGHTS = {
    "model.layers.0.self_attn.q_proj.weight": (HEADS * DIM, HIDDEN),
    "model.layers.0.self_attn.k_proj.weight": (GROUPS * DIM, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (GROUPS * DIM, HIDDEN),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
    "model.layers.0.mlp.gate_proj.weight": (12, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (12, HIDDEN),
    "model.embed_tokens.weight": (11, HIDDEN),
}
NAMES = (
    "decoder.layers.0.self_attention.linear_qkv.weight",
    "decoder.layers.0.self_attention.linear_proj.weight",
    "decoder.layers.0.mlp.linear_fc1.weight",
    "embedding.word_embeddings.weight",
)


def shape(ranks: int) -> Shape:
    def rounded(n: int) -> int:
        return -(-n // ranks) * ranks

    return Shape(HEADS, GROUPS, rounded(GROUPS), DIM, 11, rounded(11))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_shards_come_back_whole(name: str, ranks: int) -> None:
    torch.manual_seed(0)
    weights = {key: torch.randn(size) for key, size in WEIGHTS.items()}
    rule = rule_for(name, 0, shape(ranks))
    shards = [rule.load(weights.__getitem__, rank, ranks) for rank in range(ranks)]
    assert len({shard.shape for shard in shards}) == 1
    for key, tensor in zip(rule.names, rule.export(shards), strict=True):
        assert torch.equal(tensor, weights[key])


def test_padded_attention_computes_the_same() -> None:
    """One attention layer in plain torch, from two ranks' shards and from the whole weights."""
    torch.manual_seed(1)
    weights = {key: torch.randn(size) for key, size in WEIGHTS.items()}
    x = torch.randn(5, HIDDEN)

    def attend(qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        per_group = HEADS // GROUPS
        rows = (x @ qkv.t()).view(5, -1, (per_group + 2) * DIM)
        q, k, v = rows.split([per_group * DIM, DIM, DIM], dim=-1)
        q = q.reshape(5, -1, DIM).transpose(0, 1)
        k, v = (t.transpose(0, 1).repeat_interleave(per_group, 0) for t in (k, v))
        heads = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return heads.transpose(0, 1).reshape(5, -1) @ out.t()

    sums = []
    for ranks in (1, 2):
        rules = [rule_for(name, 0, shape(ranks)) for name in NAMES[:2]]
        sums.append(
            sum(
                attend(*(rule.load(weights.__getitem__, rank, ranks) for rule in rules))
                for rank in range(ranks)
            )
        )
    # fp32 sums in another order.
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-5)


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(ModelError, match="no mapping"):
        rule_for("decoder.layers.0.mlp.router.weight", 0, shape(1))
