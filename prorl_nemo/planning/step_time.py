"""Seconds of a training step by phase: a roofline of products, memory traffic and messages.

FLOPs are those the packer balances rows by (`megatron.layout.cost_model`); element-wise kernels,
which are not fused, move what the layers save (activations.py) several times; messages are
those of Megatron's layouts, none of them overlapped, as the trainer is configured.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from prorl_nemo.megatron.layout import ModelSpec, cost_model
from prorl_nemo.planning.activations import FP32, Row, Sizes, layer_saved, width
from prorl_nemo.planning.engine import Engine, Generation, generation_seconds
from prorl_nemo.planning.hardware import FITTED, GPUS_PER_NODE, Efficiency, Gpu
from prorl_nemo.planning.memory import rank_parameters
from prorl_nemo.recipe import Policy

# What a layer saves is written and read in forward, read again in backward, and its gradient
# written and read. Our choice.
_PASSES_TRAIN, _PASSES_FORWARD = 5.0, 2.0
HOST_TRANSFER = 0.5e9
"""Bytes a second of weights through host memory: 269 MB in 0.56 s, the slowest in bf16 of
docs/performance.md."""


@dataclass(frozen=True)
class Workload:
    """What one step computes.

    Attributes:
        generation: what the engines generate, rejected groups included.
        groups: prompts that are trained on.
        validation: what the engines generate for validation, and how often: share of steps.
    """

    generation: Generation
    groups: int
    minibatches: int
    validation: Generation | None = None
    validation_share: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by phase; `weights` are those on their way to the engines."""

    generation: float
    old_logprobs: float
    reference: float
    updates: float
    weights: float
    validation: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Pass:
    """A forward pass over the batch, or a training pass (forward and backward)."""

    train: bool

    def flops(self, spec: ModelSpec, policy: Policy, work: Workload) -> float:
        """Of the whole batch, over all ranks."""
        cost, g = cost_model(spec), work.generation
        behind = _responses_behind_a_prompt(policy, g)
        responses = work.groups * g.samples
        prompts = responses / behind
        own = g.mean**2 * g.spread
        # A masked product computes what is masked as well; a causal one does half.
        masked = policy.attention == "sdpa" and (behind > 1 or policy.context_parallel > 1)
        pairs = responses * (g.mean * g.prompt + own / (1 if masked else 2))
        pairs += prompts * g.prompt**2 / 2
        tokens, targets = prompts * g.prompt + responses * g.mean, responses * g.mean
        speed = 2.0 if policy.fp8 else 1.0
        if not self.train:
            layers, head, attention = cost.token / 3, cost.target / 4, cost.pair / 3
        else:
            again = {"none": (0, 0), "selective": (0, 1), "full": (1, 1)}[policy.recompute]
            layers = cost.token * (1 + again[0] / 3)
            head, attention = cost.target, cost.pair * (1 + again[1] / 3)
        return layers / speed * tokens + head * targets + attention * pairs

    def tokens(self, policy: Policy, work: Workload) -> float:
        """Of the whole batch, shared prompts counted once."""
        g = work.generation
        responses = work.groups * g.samples
        return responses * (g.mean + g.prompt / _responses_behind_a_prompt(policy, g))

    def seconds(
        self, spec: ModelSpec, policy: Policy, gpu: Gpu, share: Efficiency, work: Workload
    ) -> float:
        """Products, traffic and messages inside the model; not those of gradients."""
        tokens = self.tokens(policy, work)
        row = Row(policy.tokens_per_microbatch, 0, policy.tokens_per_microbatch, False)
        parts = work.minibatches if self.train else 1
        rows = max(1, math.ceil(tokens / parts / policy.data_parallel / row.tokens))
        plain = policy.model_copy(update={"recompute": "none", "attention": "flex"})
        saved = layer_saved(spec, plain, row, "none") / row.tokens * policy.context_parallel
        passes = _PASSES_TRAIN if self.train else _PASSES_FORWARD
        if self.train and policy.recompute == "full":
            passes += _PASSES_FORWARD
        ranks = policy.ranks
        stages, virtual = policy.pipeline_parallel, policy.virtual_pipeline
        per_rank = tokens / policy.data_parallel / policy.context_parallel * spec.layers / stages
        computed = self.flops(spec, policy, work) / ranks / (gpu.bf16_flops * share.compute)
        moved = per_rank * saved * passes / (gpu.bandwidth * share.bandwidth)
        sent = per_rank * self._messages(spec, policy, gpu) / share.network
        bubble = 1 + (stages - 1) / (virtual * rows)
        return (computed + moved + sent) * bubble

    def _messages(self, spec: ModelSpec, policy: Policy, gpu: Gpu) -> float:
        """Seconds of messages for a token a rank holds and a layer, at full speed."""
        tp, cp = policy.tensor_parallel, policy.context_parallel
        w, seconds = width(policy.precision), 0.0
        if tp > 1:
            # Two all-reduces forward, of fp32 (layers.WideRowParallelLinear), two backward.
            sizes = 2 * FP32 + (2 * w if self.train else 0)
            again = 1 + (self.train and policy.recompute == "full") * 0.5
            seconds += again * sizes * spec.hidden * 2 * (tp - 1) / tp / _speed(gpu, tp)
        if cp > 1:
            # Keys and values gathered forward, their gradients scattered backward.
            size = Sizes.of(spec, policy, Row(cp, 0, cp, False)).group * 2 * w * (cp - 1)
            seconds += size * (2 if self.train else 1) / _speed(gpu, tp * cp)
        return seconds


def _responses_behind_a_prompt(policy: Policy, g: Generation) -> float:
    if not policy.shared_prompts:
        return 1.0
    return min(g.samples, max(1.0, (policy.tokens_per_microbatch - g.prompt) / g.mean))


def _speed(gpu: Gpu, ranks: int) -> float:
    """Bytes a second between so many neighbouring ranks."""
    return gpu.nvlink if ranks <= GPUS_PER_NODE else gpu.network


def update_seconds(
    spec: ModelSpec, policy: Policy, gpu: Gpu, share: Efficiency, minibatches: int
) -> float:
    """Gradients over data-parallel ranks, Adam, and weights back, for each minibatch."""
    parameters = max(rank_parameters(spec, policy, s) for s in (0, policy.pipeline_parallel - 1))
    shards = policy.data_parallel * policy.context_parallel
    speed = _speed(gpu, policy.ranks // policy.pipeline_parallel) * share.network
    sent = parameters * (FP32 + width(policy.precision)) * (shards - 1) / shards / speed
    # Adam reads and writes weights and moments, and reads gradients: about 32 bytes a parameter.
    adam = 32 * parameters / shards / (gpu.bandwidth * share.bandwidth)
    return minibatches * (sent + adam)


def step_time(
    spec: ModelSpec,
    policy: Policy,
    gpu: Gpu,
    engine: Engine,
    engines: int,
    work: Workload,
    transfer: str = "host",
    share: Efficiency = FITTED,
) -> StepTime:
    """One step on `policy.ranks` GPUs with `engines` engines.

    Args:
        transfer: `rollout.weight_transfer`.
        share: efficiencies.
    """
    forward = Pass(train=False).seconds(spec, policy, gpu, share, work)
    # Reference and policy change places, there and back.
    held = rank_parameters(spec, policy, 0) * width(policy.precision)
    swap = 4 * held / (gpu.host * share.network)
    train = Pass(train=True).seconds(spec, policy, gpu, share, work)
    bytes_ = spec.parameters * width(policy.precision)
    speed = {
        "host": HOST_TRANSFER,
        "broadcast": gpu.network * share.network,
        "cuda_ipc": gpu.bandwidth * share.bandwidth,
    }[transfer]
    validation = 0.0
    if work.validation and work.validation_share:
        validation = work.validation_share * generation_seconds(
            spec, engine, gpu, share, work.validation, engines
        )
    return StepTime(
        generation=generation_seconds(spec, engine, gpu, share, work.generation, engines),
        old_logprobs=forward,
        reference=forward + swap,
        updates=train + update_seconds(spec, policy, gpu, share, work.minibatches),
        weights=bytes_ / speed,
        validation=validation,
    )
