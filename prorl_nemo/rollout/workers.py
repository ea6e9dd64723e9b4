"""What the engine asks of the processes that hold its weights.

These functions run in vLLM's workers, one per GPU of the engine: with one worker that is the
engine's own process, with tensor parallelism each is a child of it. There a weight update goes
bucket by bucket, every worker taking its shards from the same whole tensors. A bucket travels to
them as the engine got it: a description of shared memory or of a broadcast, or the bytes.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from prorl_nemo.rollout.complete_weights import CompleteWeights, complete_weights
from prorl_nemo.rollout.weights import Bucket, weight_checksums

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def load_weights(
    llm: Any, buckets: Iterable[tuple[Bucket, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Replace the weights of a vLLM engine in place.

    Args:
        llm: an `LLMEngine`.
        buckets: each as its parts from all ranks that have pieces of it.
        shapes: what must arrive; see `CompleteWeights`.

    Raises:
        EngineError, RuntimeError: the weights are mixed now.
    """
    if llm.vllm_config.parallel_config.tensor_parallel_size == 1:
        tensors = (tensor for parts in buckets for tensor in parts[0].tensors(*parts[1:]))
        checked = complete_weights(tensors, shapes)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checked})
        return
    llm.collective_rpc(_begin_update, args=(dict(shapes),))
    for parts in buckets:
        llm.collective_rpc(_load_bucket, args=(parts,))
    llm.collective_rpc(_finish_update)


def checksums(llm: Any, dtype: torch.dtype) -> dict[str, str]:
    """Checksum of every tensor a vLLM engine computes with, whole, by Hugging Face name."""
    found: dict[str, str] = llm.collective_rpc(_checksums, args=(dtype,))[0]
    return found


def bind_to_engine(llm: Any, died: Callable[[], None]) -> None:
    """The worker processes end with the thread that started them, and so with its process.

    Args:
        died: called, on another thread, when one of them ends for any other reason.
    """
    llm.collective_rpc(_end_with_parent)
    llm.model_executor.register_failure_callback(died)


def _begin_update(worker: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    worker.prorl_update = CompleteWeights(shapes)
    initialize_layerwise_reload(worker.get_model())


def _load_bucket(worker: Any, parts: tuple[Bucket, ...]) -> None:
    _load(worker, worker.prorl_update.checked(parts[0].tensors(*parts[1:])))


def _finish_update(worker: Any) -> None:
    """The end of vLLM's own `reload_weights`, which takes all tensors at once."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    _load(worker, worker.prorl_update.rest())
    with set_current_vllm_config(worker.vllm_config):
        finalize_layerwise_reload(worker.get_model(), worker.model_config)
    del worker.prorl_update  # It holds a bucket, by the embedding.


def _load(worker: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):
        worker.get_model().load_weights(tensors)


def _checksums(worker: Any, dtype: torch.dtype) -> dict[str, str]:
    from prorl_nemo.rollout.readback import named_weights

    with torch.inference_mode():
        return weight_checksums(named_weights(worker.get_model()), dtype)


def _end_with_parent(worker: Any) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
