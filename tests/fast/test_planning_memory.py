"""Planned memory against hand counts, transformers' shapes, and what autograd really saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from prorl_nemo.megatron import logprobs
from prorl_nemo.megatron.layout import ModelSpec
from prorl_nemo.planning import activations
from prorl_nemo.planning.activations import Row, head_saved, head_working, layer_saved
from prorl_nemo.planning.memory import rank_parameters, trainer_memory
from prorl_nemo.planning.shapes import KNOWN
from prorl_nemo.recipe import Policy

SMALL = ModelSpec(
    family="qwen2",
    layers=4,
    hidden=48,
    ffn=96,
    heads=6,
    groups=2,
    head_dim=8,
    vocab=300,
    norm_eps=1e-6,
    rope_theta=1e4,
    max_positions=4096,
    tied=False,
    qkv_bias=True,
    qk_norm=False,
)
FAMILIES = {
    "qwen2": SMALL,
    "qwen3": replace(SMALL, family="qwen3", qkv_bias=False, qk_norm=True, tied=True),
    "llama": replace(SMALL, family="llama", qkv_bias=False, groups=6),
    "qwen3-6kv": replace(SMALL, family="qwen3", qkv_bias=False, qk_norm=True, groups=6),
}


def test_the_constants_are_those_of_the_code_that_allocates() -> None:
    assert activations.BLOCK_ELEMENTS == logprobs._BLOCK_ELEMENTS
    assert activations.BLOCK_TOKENS == logprobs._BLOCK_TOKENS


def test_parameters_by_hand() -> None:
    # One layer: qkv 48 x (48 + 16 + 16) + 80 of bias, out 48 x 48, MLP 3 x 48 x 96, norms 2 x 48.
    layer = 48 * 80 + 80 + 48 * 48 + 3 * 48 * 96 + 96
    assert rank_parameters(SMALL, Policy(), 0) == 4 * layer + 2 * 300 * 48 + 48
    # Two stages of two ranks: one head pair each; the tables are cut by rows.
    half = 48 * 40 + 40 + 24 * 48 + 3 * 48 * 48 + 96
    split = Policy(tensor_parallel=2, pipeline_parallel=2)
    assert rank_parameters(SMALL, split, 0) == 2 * half + 150 * 48
    assert rank_parameters(SMALL, split, 1) == 2 * half + 150 * 48 + 48


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_transformers(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    spec = FAMILIES[family]
    config = AutoConfig.for_model(
        spec.family,
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.ffn,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.groups,
        head_dim=spec.head_dim,
        tie_word_embeddings=spec.tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert rank_parameters(spec, Policy(), 0) == sum(p.numel() for p in model.parameters())


def test_known_models_have_their_published_sizes() -> None:
    # In billions, from the models' pages; R1-Distill-Qwen-1.5B is untied, so 1.78.
    for name, size in (
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1.777),
        ("Qwen/Qwen3-4B", 4.022),
        ("meta-llama/Llama-3.1-8B", 8.030),
        ("smollm2-135m-instruct", 0.1345),
    ):
        assert rank_parameters(KNOWN[name], Policy(), 0) / 1e9 == pytest.approx(size, rel=1e-3)


class ReferenceLayer(nn.Module):
    """A decoder layer as docs/gpu.md describes the trainer's, written anew in plain torch."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, recompute: str, row: Row) -> None:
        super().__init__()
        self.spec, self.dtype, self.recompute, self.row = spec, dtype, recompute, row
        channels = (spec.heads + 2 * spec.groups) * spec.head_dim
        self.norms = nn.ParameterList([torch.ones(spec.hidden, dtype=dtype) for _ in range(2)])
        self.head_norms = nn.ParameterList(
            [torch.ones(spec.head_dim, dtype=dtype) for _ in range(2 * spec.qk_norm)]
        )
        self.qkv = nn.Linear(spec.hidden, channels, bias=spec.qkv_bias, dtype=dtype)
        self.out = nn.Linear(spec.heads * spec.head_dim, spec.hidden, bias=False, dtype=dtype)
        self.up = nn.Linear(spec.hidden, 2 * spec.ffn, bias=False, dtype=dtype)
        self.down = nn.Linear(spec.ffn, spec.hidden, bias=False, dtype=dtype)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * unit.to(self.dtype)

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spec = self.spec
        positions = torch.arange(q.shape[0]).float()
        q, k = (self.rotate(x, positions) for x in (q, k))
        parts = []
        for queries, keys in self.stretches():
            # [tokens, heads, dim] of these tokens, copied, to [1, heads, tokens, dim].
            each = [x.index_select(0, i) for x, i in ((q, queries), (k, keys), (v, keys))]
            each[1:] = (x.repeat_interleave(spec.heads // spec.groups, 1) for x in each[1:])
            before = len(keys) - len(queries)
            mask = torch.ones(len(queries), len(keys), dtype=torch.bool).tril(before)
            parts.append(
                F.scaled_dot_product_attention(
                    *(x[None].transpose(1, 2) for x in each),
                    attn_mask=mask if before else None,
                    is_causal=not before,
                )
            )
        return torch.cat(parts, 2).transpose(1, 2)[0].flatten(1)

    def stretches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(queries, keys) of the prompt and of each response; of the row where it is one."""
        behind, prompt = self.row.responses, torch.arange(self.row.prompt)
        if not self.row.shared or len(behind) == 1:
            yield torch.arange(self.row.tokens), torch.arange(self.row.tokens)
            return
        yield prompt, prompt
        start = len(prompt)
        for length in behind:
            own = torch.arange(start, start + length)
            yield own, torch.cat((prompt, own))
            start += length

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        dim = self.spec.head_dim
        angles = torch.outer(positions, 1e4 ** (-torch.arange(0, dim, 2) / dim))
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute == "full":
            result: Tensor = checkpoint(self.layer, x, use_reentrant=True)
            return result
        return self.layer(x)

    def layer(self, x: Tensor) -> Tensor:
        spec, tokens = self.spec, x.shape[0]
        each = spec.heads // spec.groups
        mixed = self.qkv(self.norm(x, self.norms[0])).view(tokens, spec.groups, -1)
        q, k, v = mixed.split([each * spec.head_dim, spec.head_dim, spec.head_dim], -1)
        q = q.reshape(tokens, spec.heads, spec.head_dim)
        if spec.qk_norm:
            q, k = self.norm(q, self.head_norms[0]), self.norm(k, self.head_norms[1])
        if self.recompute == "selective":
            attended = checkpoint(self.core, q, k, v, use_reentrant=True)
        else:
            attended = self.core(q, k, v)
        x = x + self.out(attended).float()
        gate, up = self.up(self.norm(x, self.norms[1])).chunk(2, -1)
        # Megatron's unfused gated unit adds an offset, of zero, which makes a copy.
        return x + self.down(F.silu(gate) * (up + 0.0)).float()


def really_saved(layer: ReferenceLayer, tokens: int) -> int:
    """Bytes of the storages autograd keeps, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage)  # Held, so that no address comes twice.
        return tensor

    x = torch.randn(tokens, layer.spec.hidden, requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = layer(x)
    result.sum().backward()
    return sum(s.nbytes() for address, s in kept.items() if address not in own)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_activations_are_what_autograd_keeps(
    family: str, precision: str, shared: bool, recompute: str
) -> None:
    spec = FAMILIES[family]
    policy = Policy(precision=precision, shared_prompts=shared, tokens_per_microbatch=640)  # type: ignore[arg-type]
    # Alone: one sequence that fills the row; shared: three responses and a shorter one.
    row = Row.largest(policy, 40, 190) if shared else Row(640, 0, 640, False)
    layer = ReferenceLayer(spec, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision],
                           recompute, row)  # fmt: skip
    found = really_saved(layer, row.tokens)
    planned = layer_saved(spec, policy, row, recompute)
    # Left out by the plan: frequencies, positions and the random state, a few KB.
    assert planned == pytest.approx(found, rel=0.03)


def test_the_head_needs_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak of the chunked log-probs, forward and backward, by counting what is alive."""
    for name in ("BLOCK_ELEMENTS", "BLOCK_TOKENS"):
        value = 1 << 18 if name == "BLOCK_ELEMENTS" else 256
        monkeypatch.setattr(activations, name, value)
        monkeypatch.setattr(logprobs, "_" + name, value)
    spec = replace(SMALL, hidden=64, vocab=4000)
    policy = Policy(precision="fp32", tokens_per_microbatch=1024)
    row = Row(1024, 0, 1024, False)
    targets = torch.randint(0, spec.vocab, (1024,))
    with MemTracker() as tracker:
        weight = torch.randn(spec.vocab, spec.hidden, requires_grad=True)
        hidden = torch.randn(1024, spec.hidden, requires_grad=True)
        output, _ = logprobs.response_logprobs(hidden, weight, targets, 1.2, spec.vocab)
        output.sum().backward()
    found = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    planned = head_saved(spec, policy, row) + head_working(spec, policy, row)
    # Counted besides: the weight. Planned besides: the final norm's two copies of the states.
    found -= weight.nbytes
    planned -= 2 * hidden.nbytes
    assert planned == pytest.approx(found, rel=0.03)


def test_trainer_memory_by_hand() -> None:
    """bf16, two data-parallel ranks: 2 + 4 bytes a parameter, and 12 shared by the two."""
    policy = Policy(data_parallel=2, tokens_per_microbatch=128, recompute="full")
    count = rank_parameters(SMALL, policy, 0)
    row = Row.largest(policy, 16, 64)
    found = trainer_memory(SMALL, policy, row)
    assert (found.weights, found.gradients, found.optimizer) == (2 * count, 4 * count, 6 * count)
    # The reference; a checkpoint's copy of both models, of fp32 weights and moments, not shared.
    assert found.host == (2 + 2 + 2 + 12) * count
    # Four layer inputs of 128 x 48 in fp32; the head: norm (two and a scale), states, targets.
    states = 128 * 48 * 4
    assert found.activations == 4 * states + 3 * states + 128 * (4 + 8 + 4)
    halved = policy.optimizer.model_copy(update={"moments": "bf16"})
    saved = policy.model_copy(update={"optimizer": halved})
    assert trainer_memory(SMALL, saved, row).optimizer == 4 * count
    assert trainer_memory(SMALL, saved, row).host == found.host


def test_fp32_has_no_second_set_of_weights() -> None:
    policy = Policy(precision="fp32", tokens_per_microbatch=128)
    found = trainer_memory(SMALL, policy, Row.largest(policy, 16, 64))
    count = rank_parameters(SMALL, policy, 0)
    assert found.optimizer == 8 * count
    assert found.host == (4 + 4 + 4 + 12) * count


SPEC = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"recompute": "full"}, {"recompute": "none"}),
        ({"data_parallel": 8}, {"data_parallel": 1}),
        ({"tensor_parallel": 2}, {}),
        ({"tensor_parallel": 2, "sequence_parallel": True}, {"tensor_parallel": 2}),
        ({"context_parallel": 2, "shared_prompts": False}, {"shared_prompts": False}),
        ({"tokens_per_microbatch": 8192}, {"tokens_per_microbatch": 16384}),
        ({"precision": "bf16"}, {"precision": "fp32"}),
        ({"shared_prompts": False}, {}),
        ({}, {"pipeline_parallel": 2, "virtual_pipeline": 2, "tokens_per_microbatch": 32768}),
    ],
)
def test_what_saves_memory_saves_it(less: dict[str, Any], more: dict[str, Any]) -> None:
    base = {"tokens_per_microbatch": 16384}
    sizes = []
    for settings in (less, more):
        policy = Policy(**{**base, **settings})
        sizes.append(trainer_memory(SPEC, policy, Row.largest(policy, 1024, 7168)).peak)
    assert sizes[0] < sizes[1]


def test_a_sequence_longer_than_the_budget_makes_its_own_row() -> None:
    policy = Policy(tokens_per_microbatch=4096, tensor_parallel=2, sequence_parallel=True)
    assert Row.largest(policy, 1000, 7001).tokens == 8002
    assert Row.largest(policy, 100, 700).tokens == 4096
    assert Row.largest(policy, 96, 700).responses == [700] * 5 + [500]
