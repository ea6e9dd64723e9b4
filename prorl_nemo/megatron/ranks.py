"""Joins this process to the trainer's ranks: one way in, on CPU (gloo) and GPU (NCCL)."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from prorl_nemo.recipe import Policy


def start_ranks(
    policy: Policy,
    rank: int,
    world_size: int,
    init_method: str,
    seed: int,
    collective_seconds: float = 1800.0,
) -> torch.device:
    """torch.distributed, Megatron's process groups of the layout, and the random state.

    Args:
        policy: its layout must have `world_size` ranks.
        init_method: torch.distributed address (`tcp://host:port` or `file://path`).
        collective_seconds: a rank that waits longer for another one raises.

    Returns:
        the device this rank computes on.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        cores = len(os.sched_getaffinity(0))
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        torch.set_num_threads(policy.threads or max(1, cores // neighbours))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=collective_seconds),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=policy.tensor_parallel,
        pipeline_model_parallel_size=policy.pipeline_parallel,
        virtual_pipeline_model_parallel_size=(
            policy.virtual_pipeline if policy.virtual_pipeline > 1 else None
        ),
        context_parallel_size=policy.context_parallel,
        distributed_timeout_minutes=collective_seconds / 60,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return torch.device("cuda" if on_gpu else "cpu")
