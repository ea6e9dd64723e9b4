"""Sharded checkpoints of policy, optimizer and reference with Megatron's dist_checkpointing.

A checkpoint written in one layout loads in another. The reference is saved as a
second model under the prefix `reference.`: a resumed run that fell back to the
original model as reference would silently undo every reset.

The optimizer's state is brought to model space here, not by Megatron-Core 0.16,
whose version shifts every moment behind a padded bucket and looks for torch
AdamW's `step` where it is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as torch_save

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(folder: Path, chunks: list[Any], optimizer: Any, reference: list[Tensor]) -> None:
    """Collective. `folder` must exist and be empty.

    Args:
        chunks: the model chunks of this rank (one, or more with an interleaved pipeline).
        reference: a tensor for each of their parameters, in order.
    """
    state = _state(chunks, optimizer, reference, filled=True)
    dist_checkpointing.save(state, str(folder), _InProcessSave("torch_dist", 1))


def load(folder: Path, chunks: list[Any], optimizer: Any, reference: list[Tensor]) -> None:
    """Collective. Fills the three in place."""
    state = _state(chunks, optimizer, reference, filled=False)
    loaded = dist_checkpointing.load(state, str(folder))
    for chunk, weights in zip(chunks, loaded["model"], strict=True):
        chunk.load_state_dict(weights)
    parameters = _named_parameters(chunks)
    with torch.no_grad():
        for name, tensor in zip(parameters, reference, strict=True):
            tensor.copy_(loaded["reference"][name])
        name_of = {parameter: name for name, parameter in parameters.items()}
        for part in parts_of(optimizer):
            for parameter, main, start, end in _shards(part):
                whole = loaded["optimizer"][name_of[parameter]]
                state = part.optimizer.state[main]
                main.copy_(whole["main"].flatten()[start:end].view_as(main))
                for moment in _MOMENTS:
                    state[moment].copy_(whole[moment].flatten()[start:end].view_as(main))
            _set_step(part, loaded["adam_step"])


def _named_parameters(chunks: list[Any]) -> dict[str, Any]:
    """Every parameter of the rank, by chunk number and name."""
    return {
        f"{number}.{name}": parameter
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }


class _InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's `torch_dist` format, written (and fsynced) by torch's own writer.

    Megatron's writer keeps a spawned process beside every rank, which imports torch anew and
    outlives a rank that is killed, and it forks the rank, whose gloo and autograd threads
    may hold locks at that moment.
    """

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch_save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def parts_of(optimizer: Any) -> list[Any]:
    """The single optimizers inside Megatron's chained one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def allocate_adam_state(optimizer: Any) -> None:
    """Give torch's AdamW its moments at once, all zero.

    torch allocates them in the first step, too late for loading a checkpoint. The fused
    Adam of Transformer Engine and Apex allocates its own in the same call.
    """
    for part in parts_of(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                for moment in _MOMENTS:
                    state[moment] = torch.zeros_like(parameter, dtype=torch.float32)
        _set_step(part, 0)


def _get_step(part: Any) -> int:
    group = part.optimizer.param_groups[0]
    if isinstance(part.optimizer, torch.optim.Optimizer) and "step" not in group:
        return int(part.optimizer.state[group["params"][0]]["step"])
    return int(group["step"])


def _set_step(part: Any, step: int) -> None:
    """Adam's count of updates: a tensor of its own for each parameter in torch, else one int."""
    torch_adam = isinstance(part.optimizer, torch.optim.AdamW | torch.optim.Adam)
    for group in part.optimizer.param_groups:
        if not torch_adam:
            group["step"] = step
            continue
        for parameter in group["params"]:
            part.optimizer.state[parameter]["step"] = torch.tensor(float(step))


def _shards(part: Any) -> Iterator[tuple[Any, Tensor, int, int]]:
    """(model parameter, this rank's main shard, its start and end in the flat parameter)."""
    for ranges_of_buffer in part.gbuf_ranges:
        for ranges_of_buckets in ranges_of_buffer.values():
            for bucket in ranges_of_buckets:
                for parameter, ranges in bucket["param_map"].items():
                    group, order = part.model_param_group_index_map[parameter]
                    main = part.optimizer.param_groups[group]["params"][order]
                    yield parameter, main, ranges["param"].start, ranges["param"].end


def _state(
    chunks: list[Any], optimizer: Any, reference: list[Tensor], filled: bool
) -> dict[str, Any]:
    parameters = _named_parameters(chunks)
    policy = [chunk.sharded_state_dict() for chunk in chunks]
    described = {
        f"{number}.{name}": part
        for number, chunk in enumerate(policy)
        for name, part in chunk.items()
        if isinstance(part, ShardedTensor | ShardedTensorFactory)
    }
    missing = set(parameters) - set(described)
    if missing:
        raise RuntimeError(f"Megatron gives no sharded state for {sorted(missing)}")

    def like(name: str, prefix: str, tensor: Tensor) -> Any:
        """What the policy's weight `name` is saved as, for another tensor of its shape."""
        description = described[name]
        changes: dict[str, Any] = {"key": f"{prefix}.{description.key}", "data": tensor}
        if isinstance(description, ShardedTensor):
            changes["dtype"] = tensor.dtype
        return replace(description, **changes)

    moments = _whole_optimizer_state(optimizer, parameters, filled)
    return {
        "model": policy,
        "reference": {
            name: like(name, "reference", tensor)
            for name, tensor in zip(parameters, reference, strict=True)
        },
        "optimizer": {
            name: {what: like(name, f"optimizer.{what}", t) for what, t in tensors.items()}
            for name, tensors in moments.items()
        },
        "adam_step": _get_step(parts_of(optimizer)[0]),
    }


@torch.no_grad()
def _whole_optimizer_state(
    optimizer: Any, parameters: dict[str, Any], filled: bool
) -> dict[str, dict[str, Tensor]]:
    """Main weights and moments of every parameter, whole over data parallelism, on the host."""
    whole = {
        name: {
            what: torch.zeros(parameter.shape, dtype=torch.float32) for what in ("main", *_MOMENTS)
        }
        for name, parameter in parameters.items()
    }
    if not filled:
        return whole
    name_of = {parameter: name for name, parameter in parameters.items()}
    for part in parts_of(optimizer):
        for parameter, main, start, end in _shards(part):
            tensors = {"main": main, **part.optimizer.state[main]}
            for what, tensor in whole[name_of[parameter]].items():
                tensor.view(-1)[start:end] = tensors[what].detach().flatten().cpu()
        group = part.data_parallel_group
        if dist.get_world_size(group) > 1:
            # Each element is non-zero on one rank only, so the sum is a gather.
            for tensors in whole.values():
                for tensor in tensors.values():
                    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
                    moved = tensor.to(device)
                    dist.all_reduce(moved, group=group)
                    tensor.copy_(moved)
    return whole
