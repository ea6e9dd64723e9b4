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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
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

from prorl_nemo.megatron.adamw import MOMENTS
from prorl_nemo.megatron.layout import ModelSpec
from prorl_nemo.megatron.optimizer import get_step, parts_of, set_step
from prorl_nemo.megatron.stored_weights import check_model

# Some layouts add query groups at the end of these (layout.padded_groups), so a checkpoint may hold
# more of them than the ranks that load it, or fewer. What it lacks is filled with zeros.
_PADDED = ("linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight")


def begin_save(
    folder: Path,
    spec: ModelSpec,
    chunks: list[Any],
    optimizer: Any,
    reference: list[Tensor],
    group: dist.ProcessGroup,
) -> Future[None]:
    """Collective. Copy everything to the host, and write it on a thread of its own.

    `folder` must exist and be empty. Training may go on once this returns; the checkpoint is
    there when the future is done on every rank, and its error is what went wrong.

    Args:
        group: gloo, of all ranks, used for nothing else: the writing threads agree through it
            while the ranks compute.
        spec: what the model is; a load into another model is refused.
        chunks: the model chunks of this rank (one, or more with an interleaved pipeline).
        reference: a tensor, shaped as it, for each of their parameters, in order.
    """
    state = _state(chunks, optimizer, reference, filled=True) | {"spec": asdict(spec)}
    # The optimizer's part is a copy already.
    state |= {part: _copied(state[part]) for part in ("model", "reference")}
    strategy = _BackgroundSave(group)
    dist_checkpointing.save(state, str(folder), strategy)
    assert strategy.written is not None
    return strategy.written


def load(
    folder: Path, spec: ModelSpec, chunks: list[Any], optimizer: Any, reference: list[Tensor]
) -> None:
    """Collective. Fills chunks, optimizer and reference in place.

    Raises:
        ModelError: the checkpoint is of another model.
    """
    check_model(folder, spec)
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
                for moment in MOMENTS:
                    state[moment].copy_(whole[moment].flatten()[start:end].view_as(main))
            set_step(part, loaded["adam_step"])


def _policy(chunks: list[Any]) -> list[dict[str, Any]]:
    """Megatron's description of the model's weights, each chunk's by name."""
    described: list[dict[str, Any]] = [chunk.sharded_state_dict() for chunk in chunks]
    for part in described:
        for name, description in part.items():
            if name.endswith(_PADDED):
                description.allow_shape_mismatch = True
    return described


def _named_parameters(chunks: list[Any]) -> dict[str, Any]:
    """Every parameter of the rank, by chunk number and name."""
    return {
        f"{number}.{name}": parameter
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }


def load_reference(
    folder: Path, spec: ModelSpec, chunks: list[Any], reference: list[Tensor]
) -> None:
    """Collective. Fill the reference with the *policy's* weights of a checkpoint.

    Raises:
        ModelError: the checkpoint is of another model.
    """
    check_model(folder, spec)
    described, names = _by_name(_policy(chunks)), list(_named_parameters(chunks))
    wanted = {
        name: replace(described[name], data=tensor.clone())
        for name, tensor in zip(names, reference, strict=True)
    }
    loaded = dist_checkpointing.load({"model": wanted}, str(folder))["model"]
    with torch.no_grad():
        for name, tensor in zip(names, reference, strict=True):
            tensor.copy_(loaded[name])


def _by_name(policy: list[dict[str, Any]]) -> dict[str, Any]:
    """The descriptions of `_policy` under the names of `_named_parameters`."""
    return {
        f"{number}.{name}": part
        for number, chunk in enumerate(policy)
        for name, part in chunk.items()
        if isinstance(part, ShardedTensor | ShardedTensorFactory)
    }


def _copied(state: Any) -> Any:
    """Sharded tensors in host memory of their own, which training does not change."""
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    if isinstance(state, ShardedTensor | ShardedTensorFactory) and state.data is not None:
        return replace(state, data=state.data.detach().to("cpu", copy=True))
    return state


class _BackgroundSave(TorchDistSaveShardedStrategy):
    """Megatron's `torch_dist` format, written (and fsynced) by torch's own writer on a thread.

    Megatron's writer keeps a spawned process beside every rank, which imports torch anew and
    outlives a rank that is killed, and it forks the rank, whose gloo and autograd threads
    may hold locks at that moment.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__("torch_dist", 1)
        self.group = group
        self.written: Future[None] | None = None

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        tensors = mcore_to_pyt_state_dict(state, False)

        def write() -> None:
            torch_save(
                tensors,
                storage_writer=FileSystemWriter(checkpoint_dir, sync_files=True),
                planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
                process_group=self.group,
            )

        writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.written = writer.submit(write)
        writer.shutdown(wait=False)


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
    policy = _policy(chunks)
    described = _by_name(policy)
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
        "adam_step": get_step(parts_of(optimizer)[0]),
    }


@torch.no_grad()
def _whole_optimizer_state(
    optimizer: Any, parameters: dict[str, Any], filled: bool
) -> dict[str, dict[str, Tensor]]:
    """Main weights and moments of every parameter, whole over data parallelism, on the host."""
    whole = {
        name: {
            what: torch.zeros(parameter.shape, dtype=torch.float32) for what in ("main", *MOMENTS)
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
