"""Bytes of one trainer rank by part: parameters, gradients, optimizer, and a row's activations.

Counted from what the code allocates: Megatron's distributed optimizer shards main weights and
moments over data- and context-parallel ranks (ZeRO stage 1, Rajbhandari et al., arXiv 1910.02054);
gradients are whole, in fp32. What a row adds is in activations.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from prorl_nemo.megatron.layout import ModelSpec, padded_groups, padded_vocab
from prorl_nemo.planning.activations import (
    FP32,
    Row,
    head_saved,
    head_working,
    layer_saved,
    layer_working,
    width,
)
from prorl_nemo.recipe import Policy


def layer_parameters(spec: ModelSpec, tensor_parallel: int) -> tuple[int, int]:
    """(in the four products, in norms and biases) of one layer on one tensor-parallel rank."""
    groups = padded_groups(spec, tensor_parallel) // tensor_parallel
    query = groups * (spec.heads // spec.groups) * spec.head_dim
    qkv = query + 2 * groups * spec.head_dim
    products = spec.hidden * (qkv + query + 3 * spec.ffn // tensor_parallel)
    small = 2 * spec.hidden + qkv * spec.qkv_bias + 2 * spec.head_dim * spec.qk_norm
    return products, small


def rank_parameters(spec: ModelSpec, policy: Policy, stage: int) -> int:
    """Parameters on one rank of a pipeline stage. A tied model's last stage has a copy."""
    tp, pp = policy.tensor_parallel, policy.pipeline_parallel
    first, last = stage == 0, stage == pp - 1
    table = padded_vocab(spec, tp) // tp * spec.hidden
    head = last and not (spec.tied and first)
    return (
        spec.layers // pp * sum(layer_parameters(spec, tp))
        + table * first
        + table * head
        + spec.hidden * last
    )


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes of one trainer rank on its GPU, and on the host.

    Attributes:
        fp8: Transformer Engine's copies of the layers' weights, two of a byte each.
        activations: saved by the forward passes under way.
        working: of the backward pass, at its largest.
        update: Adam's temporaries, when activations are gone.
        host: the reference, and the copy that a checkpoint is written from.
    """

    weights: int
    gradients: int
    optimizer: int
    fp8: int
    activations: int
    working: int
    update: int
    host: int

    @property
    def standing(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer + self.fp8

    @property
    def peak(self) -> int:
        return self.standing + max(self.activations + self.working, self.update)


def stage_memory(spec: ModelSpec, policy: Policy, row: Row, stage: int) -> TrainerMemory:
    """Of a rank of one pipeline stage; see `trainer_memory`."""
    w = width(policy.precision)
    pp, vpp = policy.pipeline_parallel, policy.virtual_pipeline
    parameters = rank_parameters(spec, policy, stage)
    shards = policy.data_parallel * policy.context_parallel
    moments = 2 * width(policy.optimizer.moments)
    # In fp32 the main weights are the weights.
    optimizer = -(-parameters * (moments + (FP32 if w < FP32 else 0)) // shards)
    # 1F1B keeps a row for each later stage; interleaved a little more (arXiv 2104.04473, 2.2).
    alive = float(pp - stage) if vpp == 1 else pp + (pp - 1) / vpp
    activations = spec.layers / pp * alive * layer_saved(spec, policy, row, policy.recompute)
    working = layer_working(spec, policy, row)
    if stage == pp - 1:
        activations += head_saved(spec, policy, row)
        working = max(working, head_working(spec, policy, row))
    products = spec.layers // pp * layer_parameters(spec, policy.tensor_parallel)[0]
    # Weights, reference, and of the optimizer on each rank all of it, in fp32 (checkpoint.py).
    copy = parameters * (2 * w + 3 * FP32)
    return TrainerMemory(
        weights=parameters * w,
        gradients=parameters * FP32,
        optimizer=optimizer,
        fp8=2 * products if policy.fp8 else 0,
        activations=round(activations),
        working=working,
        update=-(-parameters * FP32 // shards),
        host=parameters * w + copy,
    )


def trainer_memory(spec: ModelSpec, policy: Policy, row: Row) -> TrainerMemory:
    """Of the rank that needs most.

    Args:
        row: the largest, see `Row.largest`.
    """
    stages = {0, policy.pipeline_parallel - 1}
    found = [stage_memory(spec, policy, row, stage) for stage in sorted(stages)]
    return max(found, key=lambda memory: memory.peak)
