"""Megatron's distributed AdamW: its construction, and its state where ours must look into it.

Main weights and moments are sharded over data- and context-parallel ranks. With
`policy.optimizer.moments: bf16` our AdamW takes the place of the one inside (adamw.py): Megatron's
precision-aware optimizer needs Transformer Engine and rounds to nearest.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from prorl_nemo.megatron.adamw import MOMENTS, Bf16MomentsAdamW
from prorl_nemo.recipe import Policy


def build_optimizer(policy: Policy, chunks: list[Any], params_dtype: torch.dtype) -> Any:
    """The optimizer of this rank's chunks (Megatron's DistributedDataParallel), moments zero."""
    settings = policy.optimizer
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=policy.precision == "bf16",
            params_dtype=params_dtype,
            use_distributed_optimizer=True,
        ),
        chunks,
    )
    if settings.moments == "bf16":
        for part in parts_of(optimizer):
            part.optimizer = Bf16MomentsAdamW.in_place_of(part.optimizer)
    allocate_adam_state(optimizer)
    return optimizer


def parts_of(optimizer: Any) -> list[Any]:
    """The single optimizers inside Megatron's chained one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def allocate_adam_state(optimizer: Any) -> None:
    """Give Adam its moments at once, all zero, and a count of no updates.

    torch allocates them in the first step, too late for loading a checkpoint. The fused Adam of
    Transformer Engine and Apex allocates its own in the same call.
    """
    for part in parts_of(optimizer):
        halved = isinstance(part.optimizer, Bf16MomentsAdamW)
        dtype = torch.bfloat16 if halved else torch.float32
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                for moment in MOMENTS:
                    state[moment] = torch.zeros_like(parameter, dtype=dtype)
        set_step(part, 0)


def get_step(part: Any) -> int:
    """Adam's count of updates."""
    group = part.optimizer.param_groups[0]
    if isinstance(part.optimizer, torch.optim.Optimizer) and "step" not in group:
        return int(part.optimizer.state[group["params"][0]]["step"])
    return int(group["step"])


def set_step(part: Any, step: int) -> None:
    """The count is a tensor of its own for each parameter in torch, else one int a group."""
    torch_adam = isinstance(part.optimizer, torch.optim.AdamW | torch.optim.Adam)
    for group in part.optimizer.param_groups:
        if not torch_adam:
            group["step"] = step
            continue
        for parameter in group["params"]:
            part.optimizer.state[parameter]["step"] = torch.tensor(float(step))
