"""Chunked log-probs and entropy against the whole table, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch

from prorl_nemo.megatron import logprobs as module
from prorl_nemo.megatron.logprobs import response_logprobs


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.log_softmax(hidden.double() @ weight.double().t() / temperature, dim=-1)
    return table.gather(1, targets[:, None]).squeeze(1), -(table.exp() * table).sum(-1)


def test_by_hand() -> None:
    # Logits ln 1, ln 2, ln 5 at temperature 1: probabilities 1/8, 2/8, 5/8.
    weight = torch.tensor([[1.0], [2.0], [5.0]]).log()
    found, entropy = response_logprobs(torch.ones(2, 1), weight, torch.tensor([0, 2]), 1.0, 3)
    assert found.tolist() == pytest.approx([math.log(1 / 8), math.log(5 / 8)])
    expected = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert entropy.tolist() == pytest.approx([expected, expected])


def test_temperature_by_hand() -> None:
    # Logits 0 and 2 ln 3 at temperature 2: probabilities 1/4 and 3/4.
    weight = torch.tensor([[0.0], [2 * math.log(3)]])
    found, _ = response_logprobs(torch.ones(1, 1), weight, torch.tensor([1]), 2.0, 2)
    assert found.item() == pytest.approx(math.log(3 / 4))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.2])
# A column at a time; blocks that end in mid-row of both tokens and words; all at once.
@pytest.mark.parametrize(("elements", "tokens"), [(1, 8192), (100, 7), (500, 23), (1 << 20, 8192)])
def test_against_the_whole_table(
    temperature: float, elements: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(module, "_BLOCK_TOKENS", tokens)
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, requires_grad=True)
    weight = torch.randn(101, 16, requires_grad=True)
    targets = torch.randint(0, 101, (23,))
    upstream = torch.randn(23)
    expected, expected_entropy = plain(hidden, weight, targets, temperature)
    wanted = torch.autograd.grad(expected @ upstream.double(), (hidden, weight))
    found, entropy = response_logprobs(hidden, weight, targets, temperature, 101)
    assert found.requires_grad and not entropy.requires_grad
    got = torch.autograd.grad(found @ upstream, (hidden, weight))
    # fp32 against double: sums of 101 terms of order 10, each rounded at 6e-8.
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert entropy.tolist() == pytest.approx(expected_entropy.tolist(), rel=1e-5)
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).abs().max() / w.abs().max() < 1e-5


def test_padding_rows_have_no_probability_and_no_gradient() -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(5, 8), torch.tensor([0, 10, 3, 7, 10])
    real = torch.randn(11, 8)
    padded = torch.cat((real, torch.zeros(5, 8))).requires_grad_()
    found, entropy = response_logprobs(hidden, padded, targets, 1.0, 11)
    expected, expected_entropy = response_logprobs(hidden, real, targets, 1.0, 11)
    # The product with more columns may be summed in another order: one rounding apart.
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert entropy.tolist() == pytest.approx(expected_entropy.tolist(), rel=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), padded)
    assert not gradient[11:].any()
    assert gradient[:11].abs().sum() > 0


def test_certain_and_impossible_tokens_stay_finite() -> None:
    weight = torch.tensor([[1000.0], [0.0]])
    found, entropy = response_logprobs(torch.ones(2, 1), weight, torch.tensor([0, 1]), 1.0, 2)
    assert found.tolist() == [0.0, -1000.0]
    assert entropy.tolist() == [0.0, 0.0]


def test_no_tokens() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    found, entropy = response_logprobs(hidden, weight, torch.empty(0, dtype=torch.int64), 1.0, 11)
    assert found.shape == entropy.shape == (0,)
    gradients = torch.autograd.grad(found.sum(), (hidden, weight))
    assert gradients[0].shape == (0, 8)
    assert not gradients[1].any()


def test_bf16_operands_give_fp32_logits() -> None:
    torch.manual_seed(0)
    hidden = (4 * torch.randn(64, 32)).bfloat16()
    weight = torch.randn(200, 32).bfloat16()
    targets = torch.randint(0, 200, (64,))
    found, _ = response_logprobs(hidden, weight, targets, 1.0, 200)
    expected, _ = plain(hidden, weight, targets, 1.0)
    # Logits reach 50, whose bf16 step is 0.25: rounded logits would be off by up to 0.1.
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4


def test_products_of_bf16_numbers_in_fp32_or_bf16() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(23, 64).bfloat16().requires_grad_()
    weight = torch.randn(101, 64).bfloat16().requires_grad_()
    targets = torch.randint(0, 101, (23,))
    expected, _ = plain(hidden, weight, targets, 1.0)
    wanted = torch.autograd.grad(expected.sum(), (hidden, weight))
    off = {}
    for exact in (True, False):
        found, _ = response_logprobs(hidden, weight, targets, 1.0, 101, exact=exact)
        assert found.dtype == torch.float32
        off[exact] = (found - expected).abs().max().item()
        got = torch.autograd.grad(found.sum(), (hidden, weight))
        # Gradients come out in bf16, 8 bits; a logit off by 2**-4 moves a probability by as much.
        for g, w in zip(got, wanted, strict=True):
            assert (g - w).abs().max() / w.abs().max() < (2**-7 if exact else 2**-4)
    # fp32 sums of 64 products; logits up to 32 rounded to 8 bits, by up to 2**-4 each.
    assert off[True] < 1e-4 < off[False] < 2 * 2**-4
