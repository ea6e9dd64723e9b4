"""AdamW whose moments may be kept in bf16: 4 bytes a parameter instead of 8.

Loshchilov and Hutter (arXiv 1711.05101); operation by operation as torch computes it, in fp32, from
moments that are rounded only when they are put away. To the nearest bf16 value that would be
silently wrong: with beta2 = 0.999 the second moment changes by 0.1 % an update, bf16 steps are 0.4
to 0.8 % wide, so it would never fall. Rounded up or down at random, in proportion, it is right on
average (Gupta et al., arXiv 1502.02551). The random bits come from the numbers of update and
parameter, so an update done again is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class Bf16MomentsAdamW(torch.optim.AdamW):
    """Of fp32 parameters. Each one's state: `step`, and `exp_avg`, `exp_avg_sq` in bf16."""

    @classmethod
    def in_place_of(cls, optimizer: torch.optim.Optimizer) -> Bf16MomentsAdamW:
        """An optimizer of the same parameter groups, without any state yet.

        Megatron's shards of fp32 weights are views, which torch's constructor would refuse.
        """
        made = cls([torch.empty(0)])
        made.param_groups = optimizer.param_groups
        return made

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Raises ValueError with a closure."""
        if closure is not None:
            raise ValueError("closures are not supported: gradients are ready when it is called")
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, group, number)

    def _update(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        state["step"] += 1
        step, lr, (beta1, beta2) = int(state["step"]), group["lr"], group["betas"]
        gradient = parameter.grad
        assert gradient is not None
        first = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].float().mul_(beta2)
        second.addcmul_(gradient, gradient, value=1 - beta2)
        parameter.mul_(1 - lr * group["weight_decay"])
        spread = (second.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        parameter.addcdiv_(first, spread, value=-lr / (1 - beta1**step))
        # torch's generator on CPU takes 32 bits of a seed and drops the rest.
        seed = (step * 1_000_003 + number) % (1 << 32)
        generator = torch.Generator(parameter.device).manual_seed(seed)
        for moment, exact in zip(MOMENTS, (first, second), strict=True):
            state[moment].copy_(stochastic_bf16(exact, generator))


def stochastic_bf16(exact: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 values of any shape, each rounded to one of its bf16 neighbours, right on average.

    bf16 is the upper half of an fp32 number: a random number is added to the lower half, which is
    then cut off.
    """
    noise = torch.randint(
        0, 1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator
    )
    bits = (exact.contiguous().view(torch.int32) + noise) & -(1 << 16)
    return bits.view(torch.float32).to(torch.bfloat16)
