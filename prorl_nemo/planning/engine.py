"""One vLLM engine: its memory on each GPU beside the trainer's, and how fast it decodes.

Decoding is bound by what a step must read, weights and the KV cache of all sequences, or by what it
must compute (the roofline of Williams et al., CACM 52(4), 2009). Engines stay loaded while the
policy is trained, unless `rollout.sleep_in_updates` lets them drop weights and cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from prorl_nemo.megatron.layout import ModelSpec
from prorl_nemo.planning.activations import FP32, width
from prorl_nemo.planning.hardware import GIB, Efficiency, Gpu
from prorl_nemo.recipe import Recipe

MAX_SEQUENCES = 256
"""`max_sequences` of `rollout/engine_settings.py`."""
_ASLEEP = 3 * GIB // 2  # Graphs, buffers and context that a sleeping engine keeps. Our choice.
_ACTIVATIONS = 3 * GIB // 2  # Of an engine's prefill, with its graphs. Our choice.


@dataclass(frozen=True)
class Engine:
    """Memory of an engine on one GPU, in bytes; `token` is what one token's keys and values take.

    Attributes:
        activations: of its prefill and CUDA graphs.
        sleeps: whether weights and cache are dropped while the policy is trained.
        gpus: that share its matrices.
    """

    weights: int
    activations: int
    kv_cache: int
    token: int
    sleeps: bool = False
    gpus: int = 1

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.kv_cache

    @property
    def beside_updates(self) -> int:
        """What the trainer cannot have while it works."""
        return _ASLEEP if self.sleeps else self.total

    def sequences(self, context: float) -> int:
        """How many of `context` tokens run at once."""
        return min(MAX_SEQUENCES, int(self.kv_cache / self.token / max(context, 1.0)))


def engine_memory(recipe: Recipe, spec: ModelSpec, gpu: Gpu) -> Engine:
    """What the recipe's rollout section gives an engine; the cache may come out negative."""
    rollout = recipe.rollout
    gpus = rollout.tensor_parallel
    w = width(rollout.precision or recipe.policy.precision)
    head = FP32 * spec.vocab * spec.hidden if rollout.fp32_head and w < FP32 else 0
    weights = (w * spec.parameters + head) // gpus
    if rollout.kv_cache_mib:
        cache = (rollout.kv_cache_mib << 20) // gpus
    else:
        cache = int(gpu.memory * rollout.gpu_memory_share) - weights - _ACTIVATIONS
    # With fewer key/value heads than GPUs each head is on several of them.
    token = 2 * spec.layers * max(1, spec.groups // gpus) * spec.head_dim * w
    return Engine(weights, _ACTIVATIONS, cache, token, rollout.sleep_in_updates, gpus)


@dataclass(frozen=True)
class Generation:
    """What the engines have to generate in a step.

    Attributes:
        prompts: groups drawn, the rejected ones included; samples: responses of each.
        prompt: mean prompt tokens; mean, limit: response tokens.
        spread: mean square of the response length over the square of its mean.
        rounds: times the engines run dry, waiting for the longest response: 1 for our sampler.
    """

    prompts: float
    samples: float
    prompt: float
    mean: float
    limit: int
    spread: float
    rounds: float = 1.0


def decode_seconds(
    spec: ModelSpec, engine: Engine, gpu: Gpu, share: Efficiency, batch: float, context: float
) -> float:
    """One token for each of `batch` sequences of `context` tokens.

    Over several GPUs without the time of their messages.
    """
    flops = batch * (2 * spec.parameters + 4 * spec.layers * spec.heads * spec.head_dim * context)
    read = engine.weights + batch * context * engine.token
    computed = flops / engine.gpus / (gpu.bf16_flops * share.compute)
    return max(computed, read / (gpu.bandwidth * share.bandwidth)) + share.iteration


def generation_seconds(
    spec: ModelSpec, engine: Engine, gpu: Gpu, share: Efficiency, work: Generation, engines: int
) -> float:
    """From the first prompt to the last response.

    First the batch is full, tokens over batch size; then the longest response runs to the limit
    while the rest ends (the bound of Graham, 1969, for work dealt out as places become free).
    """
    responses = work.prompts * work.samples / engines
    # Long responses are in the batch for longer, so the mean context is above half the mean.
    context = work.prompt + work.mean * work.spread / 2
    batch = min(max(responses / work.rounds, 1.0), engine.sequences(work.prompt + work.mean))
    full = responses * work.mean / batch * decode_seconds(spec, engine, gpu, share, batch, context)
    last = max(1.0, batch / 4)
    late = work.prompt + (work.mean + work.limit) / 2
    tail = (work.limit - work.mean) * decode_seconds(spec, engine, gpu, share, last, late)
    prefill = 2 * spec.parameters * work.prompts * work.prompt / engines / engine.gpus
    return full + work.rounds * tail + prefill / (gpu.bf16_flops * share.compute)
