"""One rank of the policy: log-probs, minibatch updates, reference, weights out, checkpoints.

Knows nothing of Ray. Whoever starts the processes (Ray actors, or a test with
torch.multiprocessing) calls the same methods on every rank; each is collective.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from prorl_nemo.megatron.cpu import enable_cpu
from prorl_nemo.megatron.layout import check_layout, cost_model, read_model_spec
from prorl_nemo.megatron.packing_plan import plan_rows
from prorl_nemo.megatron.precision import (
    check_attention,
    check_fp8,
    row_multiple,
    transformer_engine_installed,
)
from prorl_nemo.recipe import Recipe
from prorl_nemo.rollout.weights import Piece, tensor_checksum
from prorl_nemo.training.batch import StepSettings, TrainingBatch

enable_cpu()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from prorl_nemo.megatron import checkpoint, hf_weights, random_state  # noqa: E402
from prorl_nemo.megatron.model import (  # noqa: E402
    build_model,
    layer_offset,
    weight_shape,
)
from prorl_nemo.megatron.optimizer import allocate_adam_state, build_optimizer  # noqa: E402
from prorl_nemo.megatron.packing import PackedRow, build_row, context_share  # noqa: E402
from prorl_nemo.megatron.ranks import start_ranks  # noqa: E402
from prorl_nemo.megatron.row_loss import row_loss, supervised_row_loss  # noqa: E402


class PolicyWorker:
    """The rank's model chunks, optimizer and reference.

    Args:
        recipe: the run's settings.
        folder: the Hugging Face folder the policy starts from.
        rank, world_size: of this process among the trainer's.
        init_method: torch.distributed address (`tcp://host:port` or `file://path`).
    """

    def __init__(
        self, recipe: Recipe, folder: Path, rank: int, world_size: int, init_method: str
    ) -> None:
        self.recipe, self.policy = recipe, recipe.policy
        self.spec = read_model_spec(folder)
        check_layout(self.policy, self.spec)
        self.device = start_ranks(
            self.policy,
            rank,
            world_size,
            init_method,
            recipe.seed,
            recipe.faults.collective_seconds,
        )
        capability = torch.cuda.get_device_capability() if self.device.type == "cuda" else None
        check_attention(self.policy, capability)
        check_fp8(self.policy, self.spec, transformer_engine_installed(), capability)
        # Of the checkpoint writer alone, which works while the ranks talk about gradients.
        self._save_group = dist.new_group(backend="gloo")
        self._build(folder)

    def _build(self, folder: Path) -> None:
        self.chunks = build_model(self.spec, self.policy, folder)
        self.config = self.chunks[0].config
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
        )
        self.ddp = [DistributedDataParallel(self.config, ddp, chunk) for chunk in self.chunks]
        self.optimizer = build_optimizer(self.policy, self.ddp, self.config.params_dtype)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        self.reference = [_on_host(p) for p in self._parameters()]

    def _parameters(self) -> list[Tensor]:
        """The model's parameters on this rank, chunk after chunk."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    # ---- forward passes -------------------------------------------------------------------

    def logprobs(
        self, batch: TrainingBatch, which: str = "policy"
    ) -> dict[int, NDArray[np.float32]]:
        """Log-probs and entropy of every response token, [2, length] for each sample index.

        Computed under the current policy or the reference (`which`). Returned by the ranks
        that hold the result (last stage, first tensor-parallel rank); {} on the others.
        """
        rows = self._rows(batch, range(len(batch.groups)))

        def collect(row: PackedRow, output: Tensor, non_loss_data: bool = True) -> Tensor:
            return output

        context = self._reference_weights() if which == "reference" else contextlib.nullcontext()
        with context, torch.no_grad():
            outputs = self._run(rows, collect, forward_only=True)
        found: dict[int, NDArray[np.float32]] = {}
        if self._reports:
            for row, output in zip(rows, outputs, strict=True):
                parts = _whole_row(row, output.float()).cpu().split(row.sample_lengths, dim=1)
                for sample, part in zip(row.sample_ids, parts, strict=True):
                    found[sample] = part.numpy()
        return found if parallel_state.get_context_parallel_rank() == 0 else {}

    @property
    def _reports(self) -> bool:
        """Whether this rank holds results: last stage, first tensor-parallel rank."""
        return bool(
            parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )

    def _rows(self, batch: TrainingBatch, groups: range) -> list[PackedRow]:
        """The packed rows of these groups that this rank takes part in."""
        policy = self.policy
        items = batch.items(groups, policy.shared_prompts, policy.tokens_per_microbatch)
        plan = plan_rows(
            items,
            policy.tokens_per_microbatch,
            parallel_state.get_data_parallel_world_size(),
            cost_model(self.spec),
            # The interleaved schedule needs a row for each pipeline rank.
            policy.pipeline_parallel if policy.virtual_pipeline > 1 else 1,
        )
        multiple, ranks = row_multiple(policy), policy.context_parallel
        rank = parallel_state.get_context_parallel_rank()
        return [
            context_share(
                build_row([items[i] for i in row], batch.temperature, multiple), rank, ranks
            )
            for row in plan[parallel_state.get_data_parallel_rank()]
        ]

    def _run(self, rows: list[PackedRow], loss: Any, forward_only: bool) -> list[Any]:
        """Megatron's schedule over the rows; what `loss` returned for each, on the last stage."""

        def forward_step(iterator: Iterator[PackedRow], model: Any) -> tuple[Tensor, Any]:
            row = next(iterator).to(self.device)
            output = model(
                row.input_ids,
                row.position_ids[None],
                None,
                packed_seq_params=row,
            )
            return output, partial(loss, row)

        self.config.microbatch_group_size_per_vp_stage = interleaved_group(
            len(rows), self.policy.pipeline_parallel
        )
        found: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(rows) for _ in self.chunks],
            model=self.ddp,
            num_microbatches=len(rows),
            seq_length=max(row.tokens for row in rows),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return found

    # ---- training -------------------------------------------------------------------------

    def train(self, batch: TrainingBatch, settings: StepSettings) -> list[dict[str, float]]:
        """The minibatch updates of one rollout. One record of figures for each update.

        Sums (`*_sum`, `tokens`) are this rank's own share: the caller adds them over the
        ranks that report. `grad_norm`, `skipped` are the same on all.
        """
        self._set_rate(settings.learning_rate)
        records = []
        for groups in batch.minibatches(settings.minibatches):
            records.append(self._update(*self.gradient(batch, groups, settings)))
        self._zero_grad()
        if self.device.type == "cuda" and self.recipe.rollout.sleep_in_updates:
            # The engines wake with the new weights, in memory that torch would keep for this rank.
            torch.cuda.empty_cache()
        return records

    def supervise(self, batch: TrainingBatch, learning_rate: float) -> list[dict[str, float]]:
        """One update of next-token prediction on the batch's responses; figures as `train`'s."""
        self._set_rate(learning_rate)
        record = self._update(*self._gradient(batch, range(len(batch.groups)), supervised_row_loss))
        self._zero_grad()
        return [record]

    def _set_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            decay = self.policy.optimizer.weight_decay
            group["weight_decay"] = decay * group.get("wd_mult", 1.0)

    def _update(self, sums: dict[str, float], norm: float) -> dict[str, float]:
        skipped = not math.isfinite(norm)
        if not skipped:
            self.optimizer.step()
        return {**sums, "grad_norm": norm, "skipped": float(skipped)}

    def gradient_norm(self, batch: TrainingBatch, settings: StepSettings) -> float:
        """Global gradient norm of the whole batch as one minibatch; nothing is updated."""
        _, norm = self.gradient(batch, range(len(batch.groups)), settings)
        self._zero_grad()
        return norm

    def _zero_grad(self) -> None:
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def gradient(
        self, batch: TrainingBatch, groups: range, settings: StepSettings
    ) -> tuple[dict[str, float], float]:
        """Gradients of one minibatch into the optimizer; figures and the global norm."""
        loss = partial(row_loss, self.recipe.algorithm, batch, settings)
        return self._gradient(batch, groups, loss)

    def _gradient(
        self, batch: TrainingBatch, groups: range, loss: Callable[..., Any]
    ) -> tuple[dict[str, float], float]:
        self._zero_grad()
        rows = self._rows(batch, groups)
        outputs = self._run(rows, loss, forward_only=False)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not self._finite_everywhere(outputs):
            norm = math.nan
        sums: dict[str, float] = {}
        if self._reports:
            for output in outputs:
                for name, value in output.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
        return sums, norm

    def _finite_everywhere(self, outputs: list[dict[str, Tensor]]) -> bool:
        """Whether the loss is a number on every rank. Collective.

        The gradient's norm does not tell: a clamp passes a NaN on with a gradient of zero, and the
        update would be made as if nothing were wrong.
        """
        wrong = any(not bool(torch.isfinite(o["loss_sum"])) for o in outputs if o)
        found = torch.tensor(float(wrong), device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return not found.item()

    def resources(self) -> tuple[str, int]:
        """The device's name, and the most bytes held on it since the last call.

        On CPU: `cpu`, and what the process holds now.
        """
        if self.device.type == "cpu":
            return "cpu", psutil.Process().memory_info().rss
        peak = torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.get_device_name(), peak

    # ---- reference ------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """The reference's weights in the model's place, and the policy's back afterwards.

        The two change places tensor by tensor, so neither device nor host holds a third model.
        """
        self._swap_reference()
        try:
            yield
        finally:
            self._swap_reference()

    @torch.no_grad()
    def _swap_reference(self) -> None:
        for here, kept in zip(self._parameters(), self.reference, strict=True):
            policy = here.detach().to("cpu", copy=True)
            here.copy_(kept)
            kept.copy_(policy)

    @torch.no_grad()
    def reset_reference(self) -> None:
        """The reference becomes the current policy. The optimizer is not touched."""
        for here, kept in zip(self._parameters(), self.reference, strict=True):
            kept.copy_(here)

    def clear_optimizer(self) -> None:
        """Forget Adam's moments and step count (the rule of ProRL v1)."""
        allocate_adam_state(self.optimizer)

    # ---- weights and checkpoints ----------------------------------------------------------

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) of this rank's stages; see hf_weights."""
        for chunk in self.chunks:
            yield from hf_weights.export_weights(
                chunk,
                layer_offset(chunk),
                weight_shape(self.spec, self.policy),
                parallel_state.get_tensor_model_parallel_group(),
            )

    def export_pieces(self) -> Iterator[Piece]:
        """This rank's pieces of its stages' tensors, without a collective."""
        for chunk in self.chunks:
            yield from hf_weights.export_pieces(
                chunk, layer_offset(chunk), weight_shape(self.spec, self.policy)
            )

    def weight_checksums(self, dtype: str) -> dict[str, str]:
        """Checksum of each exported weight as an engine of type `dtype` holds it."""
        kind = getattr(torch, dtype)
        found = {name: tensor_checksum(t, kind) for name, t in self.export_weights()}
        return found if self.publishes else {}

    def stage(self) -> int | None:
        """The pipeline stage whose weights this rank gives out, or None: another copy does."""
        copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        return None if copy else parallel_state.get_pipeline_model_parallel_rank()

    @property
    def publishes(self) -> bool:
        """Whether this rank's exported weights are the ones to use (one rank for each stage)."""
        return self.stage() is not None and parallel_state.get_tensor_model_parallel_rank() == 0

    @property
    def tensor_rank(self) -> tuple[int, int]:
        """This rank's place among those that share matrices, and their number."""
        return (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )

    @property
    def weight_bytes(self) -> int:
        """Of this rank's stages."""
        return sum(p.nbytes for chunk in self.chunks for p in chunk.parameters())

    def begin_save(self, folder: Path) -> None:
        """Copy policy, optimizer and reference, and start to write them into `folder`."""
        self._writing = checkpoint.begin_save(
            folder, self.spec, self.chunks, self.optimizer, self.reference, self._save_group
        )
        random_state.save(folder, dist.get_rank())

    def finish_save(self) -> None:
        """Wait for what `begin_save` started. Not collective, and from any thread."""
        self._writing.result()

    def load(self, folder: Path) -> None:
        """Read what `begin_save` wrote, in this or another layout."""
        trusted = _trusted_scales() if self.policy.fp8 == "delayed" else contextlib.nullcontext()
        with trusted:
            checkpoint.load(folder, self.spec, self.chunks, self.optimizer, self.reference)
        random_state.load(folder, dist.get_rank(), dist.get_world_size())

    def load_reference(self, folder: Path) -> None:
        """The reference becomes the policy of another checkpoint."""
        checkpoint.load_reference(folder, self.spec, self.chunks, self.reference)


def interleaved_group(rows: int, stages: int) -> int:
    """Rows an interleaved schedule computes with one chunk before it turns to the next.

    The fewest, from `stages` up, that leave no last group smaller than `stages`: Megatron-Core
    refuses such a group, which would wait for itself.
    """
    sizes = range(stages, rows + 1)
    return next((size for size in sizes if not 0 < rows % size < stages), stages)


def _whole_row(row: PackedRow, held: Tensor) -> Tensor:
    """[2, held targets] of each context-parallel rank -> [2, targets] of the row, on all."""
    if len(row.pieces) == 1:
        return held
    whole = held.new_zeros(2, sum(row.sample_lengths))
    whole[:, row.target_index.to(held.device)] = held
    dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
    return whole


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned where that makes its way to the device faster."""
    copied = tensor.detach().to("cpu", copy=True)
    return copied.pin_memory() if tensor.is_cuda else copied


@contextlib.contextmanager
def _trusted_scales() -> Iterator[None]:
    """Transformer Engine keeps delayed scales and their history as a pickle, and reads it only
    where it is told to trust the file. A run reads its own."""
    key = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    os.environ[key] = "1"
    try:
        yield
    finally:
        os.environ.pop(key, None)
