"""AdamW with bf16 moments: against torch's in fp32, and against what nearest rounding would do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prorl_nemo.megatron.adamw import MOMENTS, Bf16MomentsAdamW, stochastic_bf16

BETAS, EPS, DECAY, LR = (0.9, 0.999), 1e-8, 0.1, 1e-3


def optimizer(parameters: list[Tensor]) -> Bf16MomentsAdamW:
    made = Bf16MomentsAdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for parameter in parameters:
        made.state[parameter]["step"] = torch.tensor(0.0)
        for moment in MOMENTS:
            made.state[parameter][moment] = torch.zeros_like(parameter, dtype=torch.bfloat16)
    return made


def train(updates: int, count: int = 4096) -> tuple[Tensor, Tensor, Bf16MomentsAdamW]:
    """The same gradients for torch's AdamW in fp32 and for ours; returns both parameters."""
    draw = torch.Generator().manual_seed(3)
    wanted, found = (torch.linspace(-1, 1, count).requires_grad_() for _ in range(2))
    exact = torch.optim.AdamW([wanted], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    ours = optimizer([found])
    for _ in range(updates):
        wanted.grad = torch.randn(count, generator=draw)
        found.grad = wanted.grad.clone()
        exact.step()
        ours.step()
    return wanted.detach(), found.detach(), ours


def test_first_update_by_hand() -> None:
    parameter = torch.tensor([2.0]).requires_grad_()
    parameter.grad = torch.tensor([0.5])
    ours = optimizer([parameter])
    ours.step()
    # Bias-corrected moments are g and g squared, so the step is lr * g / (|g| + eps).
    assert math.isclose(parameter.item(), 2.0 * (1 - LR * DECAY) - LR, rel_tol=1e-6)
    state = ours.state[parameter]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert math.isclose(float(state["exp_avg"]), 0.05, rel_tol=2**-7)
    assert math.isclose(float(state["exp_avg_sq"]), 0.00025, rel_tol=2**-7)


def test_epsilon_by_hand() -> None:
    """A gradient as small as epsilon makes half a step: lr * g / (|g| + eps)."""
    parameter = torch.zeros(1).requires_grad_()
    parameter.grad = torch.tensor([EPS])
    optimizer([parameter]).step()
    assert math.isclose(parameter.item(), -LR / 2, rel_tol=1e-6)


def test_first_update_is_that_of_fp32() -> None:
    """Moments are rounded when they are put away, so the first update knows no rounding."""
    wanted, found, _ = train(1)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-9)


def test_many_updates_stay_near_fp32() -> None:
    wanted, found, _ = train(50)
    moved = (wanted - torch.linspace(-1, 1, 4096)).abs().mean()
    # Rounding moves a moment by up to 0.8 %, half of it on average and without a sign.
    assert (found - wanted).abs().mean() < 0.02 * moved


def test_second_moment_falls_as_it_should() -> None:
    """Gradients stop: v must fall by 0.999 an update. Rounded to nearest it would stand still."""
    parameter = torch.zeros(4096).requires_grad_()
    ours = optimizer([parameter])
    state = ours.state[parameter]
    state["exp_avg_sq"].fill_(1.0)
    parameter.grad = torch.zeros(4096)
    for _ in range(300):
        ours.step()
    # 300 independent roundings of at most 0.8 %, averaged over 4096 elements: 0.1 % is 5 sigma.
    assert math.isclose(float(state["exp_avg_sq"].float().mean()), 0.999**300, rel_tol=2e-3)
    nearest = torch.tensor(1.0, dtype=torch.bfloat16)
    assert (nearest.float() * 0.999).to(torch.bfloat16) == nearest


def test_takes_the_place_of_an_optimizer_of_views() -> None:
    """As Megatron's distributed optimizer has them of fp32 weights: no leaves, gradients set."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    megatron = torch.optim.AdamW([weight], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    shard = weight.view(-1)[1:3]
    megatron.param_groups[0]["params"] = [shard]
    ours = Bf16MomentsAdamW.in_place_of(megatron)
    ours.state[shard] = {"step": torch.tensor(0.0)} | {
        moment: torch.zeros(2, dtype=torch.bfloat16) for moment in MOMENTS
    }
    shard.grad = torch.tensor([0.5, -0.5])
    ours.step()
    kept = 1 - LR * DECAY
    wanted = torch.tensor([1.0, 2.0 * kept - LR, 3.0 * kept + LR, 4.0])
    assert torch.allclose(weight.detach(), wanted, rtol=1e-6)
    # The learning rate is set in Megatron's groups, which are the same ones.
    megatron.param_groups[0]["lr"] = 0.0
    assert ours.param_groups[0]["lr"] == 0.0


def test_the_same_update_again_is_the_same() -> None:
    _, first, ours = train(5, 64)
    _, second, again = train(5, 64)
    assert torch.equal(first, second)
    for a, b in zip(ours.state.values(), again.state.values(), strict=True):
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])


def test_stochastic_rounding_takes_a_neighbour_and_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    # A quarter of the way from 1 to the next bf16 value, 1 + 2**-7; and its mirror image.
    for value, other in ((1 + 2**-9, 1 + 2**-7), (-1 - 2**-9, -1 - 2**-7)):
        rounded = stochastic_bf16(torch.full((100_000,), value), generator).double()
        assert set(rounded.tolist()) == {math.copysign(1.0, value), other}
        share = float((rounded == other).double().mean())
        # Standard error 0.0014.
        assert abs(share - 0.25) < 0.007
    exact = torch.tensor([0.0, 1.0, -2.5, 2.0**-100])
    assert torch.equal(stochastic_bf16(exact, generator).float(), exact)
